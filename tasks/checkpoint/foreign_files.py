"""Recognizes by its first bytes a file that is not what its name says: a pointer, a web page, another format.

Such files come from a clone without Git LFS, from a server that answered with an error, and from downloads that ended
early.
"""

from __future__ import annotations

from pathlib import Path

BEGINNING_BYTES = 512
# https://github.com/git-lfs/git-lfs/blob/v3.7.0/docs/spec.md#the-pointer; the second is the name that Git LFS once had.
POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
# The three lines of a pointer, `version`, `oid sha256:` and `size`, for sizes of up to 15 digits.
POINTER_BYTES = range(124, 141)
PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml")
FORMATS = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, as PyTorch pickles weights",
    **{bytes((0x80, version)): "a Python pickle" for version in range(2, 6)},
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
}
AGAIN = "download it again"
POINTED = "git lfs pull or hf download fetches the file, unless the repo has no more than the pointer"


def beginning_of(path: Path) -> bytes:
    """Read the first BEGINNING_BYTES of a file; none if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(BEGINNING_BYTES)
    except OSError:
        return b""


def explain_content(head: bytes) -> str | None:
    """Say of a file with these first bytes what it is instead of JSON, a tokenizer or a template; None: nothing known.

    The answer is the part of a sentence that follows the file's name.
    """
    if not head:
        return f"is empty: {AGAIN}"
    if head.startswith(POINTERS):
        return f"is a Git LFS pointer, not the file: {POINTED}"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:20].lower().startswith(PAGES):
        return f"is a web page, not the file: {AGAIN}"
    return None


def explain_shard(head: bytes) -> str:
    """Say of a file with these first bytes, whose header has no possible length, why it is no safetensors file."""
    if explained := explain_content(head):
        return explained
    known = next((words for magic, words in FORMATS.items() if head.startswith(magic)), None)
    if known:
        return f"is {known}, not safetensors: put the safetensors file in its place"
    if not any(head):
        return f"begins with zeros, as a download that has not ended: {AGAIN}"
    words = head[:40].decode("ascii", errors="replace")
    if words.isascii() and words.strip().isprintable():
        return f"is text, not safetensors ({words.strip()!r}): {AGAIN}"
    return f"is not a whole safetensors file, since its header length cannot be right: {AGAIN}"
