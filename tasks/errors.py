"""Every failure that Requant expects, each with a standard-library parent.

The message is one sentence: what went wrong with which name and value, and what to do next.
`retryable` says whether the same call may succeed later; retries read nothing else.
"""

from __future__ import annotations

import errno
import os


class RequantError(Exception):
    """Base of all expected failures: shown as a sentence, never as a traceback."""

    retryable = False

    def __str__(self) -> str:
        return redact(super().__str__())


class RecipeError(RequantError, ValueError):
    """The recipe, or a setting of the environment, cannot work as written (exit status 2)."""


class FolderInUse(RecipeError):
    """A folder or file that the user named to be written holds what is not Requant's, or cannot be written."""


class CheckpointError(RequantError, ValueError):
    """A checkpoint's files contradict each other or the format."""


class TooFewTokens(CheckpointError):
    """A checkpoint's tokenizer makes fewer tokens of a text than measuring needs."""


class StoreError(RequantError, OSError):
    """The store answered, but cannot do what was asked."""


class StoreUnreachable(StoreError, ConnectionError):
    """The store did not answer: a lost connection, a time-out, a server error.

    Not retryable: the store itself has waited for it by then, two minutes in the middle of a run.
    """


class CorruptBlob(StoreError):
    """Bytes do not have the sha256 that names them."""


class Collected(StoreError):
    """Garbage collection took what was being put together: it can be made again."""

    retryable = True


class DiskFull(RequantError, OSError):
    """No room left where a file was being written."""


class HubError(RequantError, OSError):
    """The Hub refused: no such repo or revision, no access, a stale parent commit."""


class HubUnavailable(HubError, ConnectionError):
    """The Hub failed in a way that passes: 5xx, 429, a cut connection."""

    retryable = True


class Refused(RequantError, ValueError):
    """A run that could not end well was not begun: the plan's sentence."""


class WrongToolVersion(RequantError, RuntimeError):
    """A stage was not begun: its result would be kept under tool versions that this machine does not have."""


class QuantizeFailed(RequantError, RuntimeError):
    """The quantize child ended without a result, in a way that the same call repeats."""


class QuantizeDied(QuantizeFailed):
    """The quantize child was killed from outside: its finished blocks stay finished. `killed`: by SIGKILL."""

    retryable = True
    killed = False


class OutOfMemory(QuantizeFailed, MemoryError):
    """The quantize child ran out of memory at every rung of the ladder."""


class EvaluationFailed(RequantError, RuntimeError):
    """lm-eval could not run a task: its data, its definition or its metric."""


class EngineFailed(RequantError, RuntimeError):
    """An inference engine did not start, ended, or answered what it should not."""


class StageTimeout(RequantError, TimeoutError):
    """A stage took longer than it may."""


class RenderingTimeout(StageTimeout):
    """Reading a text took longer than it may, by the clock: on a machine that is less busy it may end."""

    retryable = True


# ENOSPC: the disk is full; EDQUOT: the user's quota is; EFBIG: the process's file size limit is reached.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def explain_os_error(error: OSError, path: str | os.PathLike[str] | None = None) -> RequantError | None:
    """Turn an operating system error that users meet into a sentence; None for any other."""
    where = os.fspath(path) if path is not None else (error.filename or "the working folder")
    if error.errno in NO_ROOM:
        return DiskFull(
            f"no room left while writing {where} ({error.strerror}): free disk space there, "
            "or set REQUANT_STORE and TMPDIR to a larger disk, and run again"
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
    for value, name in sorted(secrets, key=lambda secret: -len(secret[0])):  # one may begin with another
        if len(value) >= 4:
            text = text.replace(value, f"<{name}>")
    return text
