"""`requant.json`: what a published repo claims to hold, and how that came to be. Lies beside the weights.

files      path, size, sha256 of every file but this one and .gitattributes; of small ones git's blob id too, by
           which the Hub lists what it does not keep in LFS
beside     which of them are not the artifact's: the card, the recipe, the report, its pictures
base       repo_id and commit; artifact, recipe: their digests; gates: measured values and limits
provenance each stage's record: settings, tool versions, hardware, seconds, measured values
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from requant.tasks.artifact import GITATTRIBUTES, RELEASE, SHA256, File, Manifest
from requant.tasks.checkpoint.untrusted import check_depth, parse, shown
from requant.tasks.errors import CheckpointError, HubError
from requant.tasks.hub.revision import COMMIT, HubFile, Revision
from requant.tasks.hub.sparse_checkout import stream
from requant.tasks.redaction import public

FORMAT = 1
MAX_REGULAR_FILE_BYTES = 10 << 20  # bytes: what is larger, the Hub keeps in LFS, whatever its name
MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class ReleaseManifest:
    """A published repo's own account of itself."""

    base_repo_id: str
    base_sha: str
    artifact: str
    files: Mapping[str, File]
    blob_ids: Mapping[str, str]
    beside: frozenset[str]
    failed_gates: tuple[str, ...]

    @classmethod
    def read(cls, raw: bytes, name: str) -> ReleaseManifest:
        """Read the `requant.json` of the repo `name`. Raises HubError unless it is one that agrees with itself."""
        try:
            document, _ = parse(raw)
            check_depth(document)
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']!r}, and this version of Requant reads {FORMAT}")
            rows = document["files"]
            manifest = Manifest.of(File(str(r["path"]), int(r["size"]), str(r["sha256"])) for r in rows)
            beside = frozenset(map(str, document["beside"]))
            made = cls(
                str(document["base"]["repo_id"]),
                str(document["base"]["sha"]),
                str(document["artifact"]),
                {file.path: file for file in manifest.files},
                {str(r["path"]): str(r["blob_id"]) for r in rows if "blob_id" in r},
                beside,
                tuple(str(gate["name"]) for gate in document["gates"] if not _may_be_published(gate)),
            )
            if not COMMIT.fullmatch(made.base_sha) or not all(SHA256.fullmatch(f.sha256) for f in manifest.files):
                raise ValueError("a hash in it is none")
            if Manifest.of(f for f in manifest.files if f.path not in beside).digest != made.artifact:
                raise ValueError("its files do not have the artifact digest that it names")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            said = shown(str(error) if isinstance(error, CheckpointError | ValueError) else repr(error))
            raise HubError(f"the {RELEASE} of {name} is not what Requant writes ({said}): restore it") from error
        return made

    @property
    def tag(self) -> str:
        return tag_of(self.base_sha, self.artifact)

    def differences(self, revision: Revision) -> list[str]:
        """What the Hub lists otherwise than this says, as sentences; by its hashes, without fetching anything."""
        there = {file.path: file for file in revision.files}
        lost = [f"{shown(path)} is missing" for path in self.files if path not in there]
        extra = [
            f"{shown(path)} is there, and {RELEASE} does not name it"
            for path in (*there, *revision.left_out)
            if path not in self.files and path not in {RELEASE, GITATTRIBUTES}
        ]
        altered = [
            f"{shown(path)} is not the file that {RELEASE} names ({there[path].size:,} bytes of {file.size:,})"
            for path, file in self.files.items()
            if path in there and not self._same(there[path], file)
        ]
        return [*altered, *lost, *extra]

    def _same(self, theirs: HubFile, ours: File) -> bool:
        """By sha256 where the Hub has one (LFS), else by git blob id."""
        if theirs.sha256 is not None:
            return theirs.sha256 == ours.sha256 and theirs.size == ours.size
        return theirs.size == ours.size and theirs.blob_id == self.blob_ids.get(ours.path)


def _may_be_published(gate: Mapping[str, Any]) -> bool:
    """Whether a gate passed; or has no limit and could not be measured (tasks/validating/gates.py)."""
    return gate["passed"] is True or (gate["passed"] is None and gate["limit"] is None)


def read_release(revision: Revision) -> ReleaseManifest | None:
    """What a repo says that it holds; None without `requant.json`. Raises HubError, HubUnavailable."""
    file = next((f for f in revision.files if f.path == RELEASE), None)
    if file is None:
        return None
    if not 0 < file.size <= MAX_MANIFEST_BYTES:
        raise HubError(f"the {RELEASE} of {revision.name} has {file.size:,} bytes: restore it")
    return ReleaseManifest.read(b"".join(stream(revision, RELEASE, 0, file.size)), revision.name)


def tag_of(base_sha: str, artifact: str) -> str:
    """The name of a release: of which commit of the base, and what was made of it."""
    return f"{base_sha[:7]}-{artifact[:7]}"


def release_document(
    *,
    version: str,
    base: Revision,
    artifact: Manifest,
    beside: Sequence[File],
    blob_ids: Mapping[str, str],
    recipe_digest: str,
    gates: Iterable[Mapping[str, Any]],
    provenance: Mapping[str, Mapping[str, Any]],
) -> bytes:
    """The bytes of `requant.json`: nothing in it depends on when it is written, or where."""
    files = sorted([*artifact.files, *beside])
    document = {
        "format": FORMAT,
        "requant": version,
        "base": {"repo_id": base.repo_id, "sha": base.sha},
        "artifact": artifact.digest,
        "recipe": recipe_digest,
        "files": [
            {"path": f.path, "size": f.size, "sha256": f.sha256}
            | ({"blob_id": blob_ids[f.path]} if f.path in blob_ids else {})
            for f in files
        ],
        "beside": sorted(file.path for file in beside),
        "gates": public(list(gates)),
        "provenance": public(dict(provenance)),
    }
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
