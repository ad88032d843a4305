"""The expected failures, each with a parent from the standard library.

The message of an error is one sentence: what went wrong with which name and value, and what to do. `retryable` says
whether the same call may succeed later; retries depend on nothing else. Some errors also say in attributes what they
concern: `path`, `repo_id`, `key` and the like, which are None where the error concerns none or several.
"""

from __future__ import annotations

import errno
import os

StrPath = str | os.PathLike[str]


class RequantError(Exception):
    """Base of all expected failures, which are shown as a sentence and never as a traceback."""

    retryable = False

    def __str__(self) -> str:
        return redact(super().__str__())


class RecipeError(RequantError, ValueError):
    """The recipe, or a setting of the environment, cannot work as written (exit status 2).

    `path` is the file or folder in question.
    """

    def __init__(self, message: str, *, path: StrPath | None = None) -> None:
        super().__init__(message)
        self.path = path


class FolderInUse(RecipeError):
    """A folder or file that was to be written cannot be, or has content that Requant did not write."""


class CheckpointError(RequantError, ValueError):
    """The files of a checkpoint contradict each other or the format. `path` is a file or folder, `tensor` a name."""

    def __init__(self, message: str, *, path: StrPath | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.tensor = tensor


class TokenizerError(CheckpointError):
    """A checkpoint's tokenizer cannot be loaded, or makes tokens that the model does not know."""


class TooFewTokens(TokenizerError):
    """A checkpoint's tokenizer makes too few tokens of a text for measuring."""


class StoreError(RequantError, OSError):
    """The store answered, but cannot do what was asked. `key` is that of the object in question."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class StoreUnreachable(StoreError, ConnectionError):
    """The store did not answer: a lost connection, a timeout, a server error.

    It is not retryable, since the store has retried by itself, in the middle of a run for two minutes.
    """


class CorruptBlob(StoreError):
    """A blob does not have the sha256 in its name."""


class Collected(StoreError):
    """Garbage collection deleted blobs before their manifest was written. The artifact can be made again."""

    retryable = True


class DiskFull(RequantError, OSError):
    """There was no room left to write a file to `path`."""

    def __init__(self, message: str, *, path: StrPath | None = None) -> None:
        super().__init__(message)
        self.path = path


class HubError(RequantError, OSError):
    """The Hub refused: no such repo or revision, no access, or a stale parent commit. `repo_id` is the repo."""

    def __init__(self, message: str, *, repo_id: str | None = None) -> None:
        super().__init__(message)
        self.repo_id = repo_id


class HubUnavailable(HubError, ConnectionError):
    """A temporary failure of the Hub: 5xx, 429 or a lost connection."""

    retryable = True


class Refused(RequantError, ValueError):
    """A run was not started, because its plan has problems."""


class WrongToolVersion(RequantError, RuntimeError):
    """A `stage` was not started, because its key names versions of tools that this machine does not have."""

    def __init__(self, message: str, *, stage: str | None = None) -> None:
        super().__init__(message)
        self.stage = stage


class QuantizeFailed(RequantError, RuntimeError):
    """The quantize child ended without a result, and would do so again."""


class QuantizeDied(QuantizeFailed):
    """The quantize child ended without reporting an error, for example because a signal killed it or it crashed.

    Its finished blocks are kept, and the next run resumes after them. `killed`: by SIGKILL.
    """

    retryable = True

    def __init__(self, message: str, *, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed


class OutOfMemory(QuantizeFailed, MemoryError):
    """The quantize child ran out of memory even with the settings that need the least memory, or another stage did."""


class EvaluationFailed(RequantError, RuntimeError):
    """lm-eval could not run a task, because of its data, its definition or its metric."""


class EngineFailed(RequantError, RuntimeError):
    """An inference engine did not start, ended early, or gave an invalid answer."""


class StageTimeout(RequantError, TimeoutError):
    """A stage exceeded its time limit."""


class RenderingTimeout(StageTimeout):
    """Reading a text exceeded its time limit. On a machine that is less busy it may not."""

    retryable = True


# The disk is full, the user's quota is used up, or the process's limit of file sizes is reached.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def explain_os_error(error: OSError, path: StrPath | None = None) -> RequantError | None:
    """Return an expected error, with a sentence, for an error of the operating system; None if it is unusual."""
    where = os.fspath(path) if path is not None else (error.filename or "the working folder")
    if error.errno in NO_ROOM:
        return DiskFull(
            f"no room left while writing {where} ({error.strerror}): free disk space there, "
            "or set REQUANT_STORE and TMPDIR to a larger disk, and run again",
            path=where,
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return StoreError(
            f"{where} cannot be used ({error.strerror}): give this user access to it, "
            "or set REQUANT_STORE to another folder"
        )
    if error.errno in {errno.EISDIR, errno.ENOTDIR}:
        return StoreError(f"{error.filename2 or where} is in the way ({error.strerror}): move it and run again")
    return None


SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "REQUANT_API_KEY",
    "REQUANT_WEBHOOK_SECRET",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING",
)


def redact(text: str) -> str:
    """Replace the values of secret environment variables by their names."""
    secrets = [(os.environ.get(name) or "", name) for name in SECRET_VARIABLES]
    for value, name in sorted(secrets, key=lambda secret: -len(secret[0])):  # One may be the beginning of another.
        if len(value) >= 4:
            text = text.replace(value, f"<{name}>")
    return text
