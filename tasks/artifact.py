"""Artifacts: immutable sets of files, identified by a digest of their content.

A digest covers the sorted (path, size, sha256) of every file, and no times, versions or settings. A stage key covers
everything that determines the result of a stage, so that any machine can compute it before the stage runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from requant.tasks.errors import CheckpointError, StoreError

SHA256 = re.compile(r"[0-9a-f]{64}")
# Files that a published repo has in addition to the artifact. A base's files of these names are not copied. The Hub
# writes .gitattributes itself.
RELEASE_FILES = CARD, RELEASE, RECIPE, REPORT = "README.md", "requant.json", "recipe.yaml", "report.md"
MAX_CARD_BYTES = 1 << 20  # A base's card that is larger is ignored.
GITATTRIBUTES = ".gitattributes"
GENERATION_CONFIG = "generation_config.json"  # how answers are sampled by default
REWRITTEN = (*RELEASE_FILES, GITATTRIBUTES)
PICTURES = "pictures"  # the folder with the pictures of a release


@dataclass(frozen=True, order=True)
class File:
    """A file of an artifact: its POSIX path relative to the root, its size in bytes, and its sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of one artifact, sorted by path."""

    files: tuple[File, ...]

    @classmethod
    def of(cls, files: Iterable[File]) -> Manifest:
        """Create a manifest. Raises CheckpointError for a path that leaves the folder, is there twice, or is a folder.

        Paths that differ only in case or in the Unicode form of an accent count as one: on many file systems the second
        file would silently replace the first.
        """
        ordered = tuple(sorted(files))
        seen: dict[str, str] = {}
        for file in ordered:
            check_relative(file.path)
            folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", file.path).casefold())
            if folded in seen:
                raise CheckpointError(
                    f"{file.path} stands twice in one artifact (where case is ignored, it is {seen[folded]}): "
                    "keep one of the two"
                )
            seen[folded] = file.path
        for folded, path in seen.items():
            for parent in PurePosixPath(folded).parents:
                if str(parent) in seen:
                    raise CheckpointError(
                        f"{path} lies in what is a file too, {seen[str(parent)]}: keep one of the two"
                    )
        return cls(ordered)

    @cached_property
    def digest(self) -> str:
        """The sha256 over one line `path NUL size NUL sha256` per file, sorted by path."""
        lines = (f"{f.path}\0{f.size}\0{f.sha256}\n" for f in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    @property
    def weights(self) -> int:
        """Bytes of the weight files, which is the usual size of a model."""
        return sum(f.size for f in self.files if f.path.endswith(".safetensors"))

    def __getitem__(self, path: str) -> File:
        return self._by_path[path]

    def __contains__(self, path: str) -> bool:
        return path in self._by_path

    @cached_property
    def _by_path(self) -> dict[str, File]:
        return {f.path: f for f in self.files}

    def to_json(self) -> str:
        files = [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in self.files]
        return json.dumps({"digest": self.digest, "files": files}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest. Raises StoreError if it is damaged, or contradicts its own digest."""
        try:
            document = json.loads(text)
            files = [File(f["path"], f["size"], f["sha256"]) for f in document["files"]]
            if not all((type(f.path), type(f.size), type(f.sha256)) == (str, int, str) and f.size >= 0 for f in files):
                raise ValueError("a file is a path, a size in bytes and a sha256")
            manifest = cls.of(files)
            stated = document["digest"]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise StoreError(f"a manifest in the store cannot be read ({error}): delete it and run again") from error
        if manifest.digest != stated or not all(SHA256.fullmatch(f.sha256) for f in files):
            raise StoreError("a manifest in the store contradicts its own digest: delete it and run again")
        return manifest


def check_relative(path: str) -> None:
    """Raise CheckpointError for a path that could leave the folder that it is joined to, or that is too long.

    Such paths are absolute, empty, or contain `..`, a backslash or NUL. The limits are 1024 bytes for a path, as for S3
    keys without their prefix, and 255 for a name, as in file systems.
    """
    pure = PurePosixPath(path)
    bad = path in {"", "."} or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path
    lengths = [len(part.encode("utf-8", "replace")) for part in (path, *pure.parts)]
    if bad or str(pure) != path or lengths[0] > 1024 or max(lengths[1:]) > 255 or not path.isprintable():
        raise CheckpointError(
            f"the file name {path[:80]!r} is not allowed: names must stay inside their folder "
            "and have at most 255 bytes, paths 1024"
        )


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_blob_id_of(data: bytes) -> str:
    """Compute the git blob id of these bytes: the sha1 over `blob SIZE NUL` and the bytes."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def git_blob_id(path: Path) -> str:
    """Compute the git blob id of a file."""
    hasher = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def file_of(root: Path, path: str) -> File:
    """Describe the file `path` below `root`, which is read once."""
    full = root / path
    return File(path, full.stat().st_size, sha256_of(full))


def write_back(descriptor: int, start: int, length: int) -> None:
    """Start writing a finished range of a file to the disk, so that the fsync at the end is quick."""
    if hasattr(os, "posix_fadvise"):
        # Linux starts to write dirty pages, keeps them cached, and drops pages that are written.
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """Write a file to disk with fsync, or a folder after a rename in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(document: Any) -> str:
    """Compute the sha256 of a JSON document in canonical form: sorted keys, no white space."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class KeyParts:
    """What a stage key covers: see `stage_key`. A record has it, so that a plan can say what changed since."""

    version: int
    reads: Mapping[str, str]
    settings: Mapping[str, Any]
    tools: Mapping[str, str]

    @classmethod
    def from_json(cls, document: object) -> KeyParts | None:
        """Read the parts from a record, which is untrusted. None if they are not there or have other types."""
        if not isinstance(document, dict):
            return None
        version, reads, settings, tools = (document.get(name) for name in ("version", "reads", "settings", "tools"))
        if type(version) is not int or not isinstance(settings, dict):
            return None
        if not all(isinstance(part, dict) and all(type(v) is str for v in part.values()) for part in (reads, tools)):
            return None
        return cls(version, dict(reads or {}), settings, dict(tools or {}))


class StageKey(str):
    """A stage key, with what it covers."""

    parts: KeyParts

    @classmethod
    def of(cls, stage: str, parts: KeyParts) -> StageKey:
        key = cls(digest_of({"stage": stage, **vars(parts)}))
        key.parts = parts
        return key


def stage_key(
    stage: str, version: int, *, reads: Mapping[str, str], settings: Mapping[str, Any], tools: Mapping[str, str]
) -> StageKey:
    """Compute the key of a stage, which identifies its result.

    `reads` has a digest of each input by name, `settings` the part of the recipe that the stage reads, and `tools` the
    declared (locked) versions of the tools that shape the result.
    """
    return StageKey.of(stage, KeyParts(version, reads, settings, tools))
