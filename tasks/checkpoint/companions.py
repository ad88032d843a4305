"""The small files beside the weights that transformers and the engines read: tokenizer, chat template, processors."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from requant.tasks.checkpoint.foreign_files import AGAIN, POINTER_BYTES, explain_content
from requant.tasks.checkpoint.header import size_of
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*")
# Files of a tokenizer, besides those of its chat template and config.json.
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "tekken.json",
)  # fmt: skip
SETTINGS = ("generation_config.json", "*processor_config.json")
# Of a tokenizer's files, those that say how a text becomes tokens; `tokenization_*.py` may do without others.
VOCABULARIES = (
    "tokenizer.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "tokenization_*.py"
)  # fmt: skip
PARSED_BYTES = 1 << 16  # JSON of at most this size is parsed; of a larger file, both ends are looked at
NUL = b"\0"


def is_companion(path: str) -> bool:
    """Check whether a path is that of one of these files."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in (*TOKENIZER, *TEMPLATES, *SETTINGS))


def may_be_pointer(path: str, size_bytes: int) -> bool:
    """Check by its size whether one of these files may be a Git LFS pointer."""
    return size_bytes in POINTER_BYTES and is_companion(path)


def has_vocabulary(paths: Iterable[str]) -> bool:
    """Check whether a tokenizer is among these files, by their names."""
    return any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in VOCABULARIES)


def companion_problems(folder: Path) -> Iterator[str]:
    """Yield a sentence for each of these files that is a pointer, empty, a web page, or JSON that is cut off.

    A file that begins with a NUL is left out: in a sparse checkout it has not been fetched.
    """
    for name in sorted(entry.name for entry in os.scandir(folder)):
        if is_companion(name) and (explained := _explain(folder / name)):
            yield f"{shown(name)} {explained}"


def _explain(path: Path) -> str | None:
    try:
        size = size_of(path)
        if not size:
            return explain_content(b"")
        with path.open("rb") as stream:
            head = stream.read(PARSED_BYTES)
            stream.seek(max(0, size - 512))
            tail = stream.read(512)
    except FileNotFoundError:
        return "is a link to a file that is missing: fetch the file"
    except (CheckpointError, OSError):
        return None if path.is_dir() else "cannot be read: restore it"
    if head.startswith(NUL):
        return None
    if (explained := explain_content(head)) is not None:
        return explained
    if path.suffix != ".json":
        return None
    if size > len(head):
        return None if tail.rstrip().endswith((b"}", b"]")) else f"does not end as JSON does, so it is cut off: {AGAIN}"
    try:
        json.loads(head)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error}): {AGAIN}"
    return None
