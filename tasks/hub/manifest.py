"""`requant.json`: the manifest of a published repo, which lists its files and how they were made.

files       path, size and sha256 of every file but this one and .gitattributes. Small files have git's blob id too, as
            the Hub lists that for files outside of LFS
beside      the paths of files that are not part of the artifact: the card, the recipe, the report, its pictures
base        repo_id and commit; of a base in a folder its name and a digest of its files, and that it is `local`
artifact    the digest of the artifact
recipe      the digest of the recipe
gates       measured values and limits
provenance  the record of each stage: settings, tool versions, hardware, seconds, measured values
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
from requant.tasks.record import StageRecord
from requant.tasks.redaction import public

FORMAT = 1
MAX_REGULAR_FILE_BYTES = 10 << 20  # the Hub stores larger files in LFS, whatever their names
MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class ReleaseManifest:
    """The content of a `requant.json`. `release_files` are the paths that it lists under `beside`.

    `bits` are those of the quantized weights; None where the manifest does not say.
    """

    base_repo_id: str
    base_sha: str
    artifact: str
    files: Mapping[str, File]
    blob_ids: Mapping[str, str]
    release_files: frozenset[str]
    failed_gates: tuple[str, ...]
    adapter_repo_id: str | None = None
    bits: int | None = None

    @classmethod
    def read(cls, raw: bytes, name: str) -> ReleaseManifest:
        """Parse the `requant.json` of the repo `name`. Raises HubError if it is malformed or contradicts itself."""
        try:
            document, _ = parse(raw)
            check_depth(document)
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']!r}, and this version of Requant reads {FORMAT}")
            rows = document["files"]
            manifest = Manifest.of(File(str(r["path"]), int(r["size"]), str(r["sha256"])) for r in rows)
            release_files = frozenset(map(str, document["beside"]))
            parsed = cls(
                str(document["base"]["repo_id"]),
                str(document["base"]["sha"]),
                str(document["artifact"]),
                {file.path: file for file in manifest.files},
                {str(r["path"]): str(r["blob_id"]) for r in rows if "blob_id" in r},
                release_files,
                tuple(str(gate["name"]) for gate in document["gates"] if not _may_be_published(gate)),
                str(document["adapter"]["repo_id"]) if "adapter" in document else None,
                StageRecord(document["provenance"].get("quantize") or {}).bits,
            )
            if not COMMIT.fullmatch(parsed.base_sha) or not all(SHA256.fullmatch(f.sha256) for f in manifest.files):
                raise ValueError("a hash in it is none")
            if Manifest.of(f for f in manifest.files if f.path not in release_files).digest != parsed.artifact:
                raise ValueError("its files do not have the artifact digest that it names")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            said = shown(str(error) if isinstance(error, CheckpointError | ValueError) else repr(error))
            raise HubError(f"the {RELEASE} of {name} is not what Requant writes ({said}): restore it") from error
        return parsed

    @property
    def model_name(self) -> str:
        """The name of what was quantized, as `Revision.model_name`."""
        adapter = "" if self.adapter_repo_id is None else f" with the adapter {self.adapter_repo_id}"
        return f"{self.base_repo_id}{adapter}"

    @property
    def tag(self) -> str:
        return tag_of(self.base_sha, self.artifact)

    def differences(self, revision: Revision) -> list[str]:
        """Return a sentence for each difference to the files that the Hub lists. Only hashes are compared."""
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

    def _same(self, on_hub: HubFile, file: File) -> bool:
        """Compare by sha256 where the Hub has one (LFS), and else by git blob id."""
        if on_hub.sha256 is not None:
            return on_hub.sha256 == file.sha256 and on_hub.size == file.size
        return on_hub.size == file.size and on_hub.blob_id == self.blob_ids.get(file.path)


def _may_be_published(gate: Mapping[str, Any]) -> bool:
    """Check whether a gate passed, or has no limit and could not be measured (tasks/validating/gates.py)."""
    return gate["passed"] is True or (gate["passed"] is None and gate["limit"] is None)


def read_release(revision: Revision) -> ReleaseManifest | None:
    """Download and parse a repo's `requant.json`. Return None if it has none. Raises HubError, HubUnavailable."""
    file = next((f for f in revision.files if f.path == RELEASE), None)
    if file is None:
        return None
    if not 0 < file.size <= MAX_MANIFEST_BYTES:
        raise HubError(
            f"the {RELEASE} of {revision.name} has {file.size:,} bytes: restore it", repo_id=revision.repo_id
        )
    return ReleaseManifest.read(b"".join(stream(revision, RELEASE, 0, file.size)), revision.name)


def tag_of(base_sha: str, artifact: str) -> str:
    """Return the tag of a release: the beginnings of the base's commit and of the artifact's digest."""
    return f"{base_sha[:7]}-{artifact[:7]}"


@dataclass(frozen=True)
class Origin:
    """What a release was made from: the base, the digest of the recipe, and the version of Requant."""

    base: Revision
    recipe_digest: str
    version: str


def release_document(
    *,
    origin: Origin,
    artifact: Manifest,
    release_files: Sequence[File],
    blob_ids: Mapping[str, str],
    gates: Iterable[Mapping[str, Any]],
    provenance: Mapping[str, StageRecord],
) -> bytes:
    """Return the bytes of `requant.json`. They do not depend on the time or machine."""
    files = sorted([*artifact.files, *release_files])
    document = {
        "format": FORMAT,
        "requant": origin.version,
        "base": _named(origin.base),
        **({"adapter": _named(origin.base.adapter)} if origin.base.adapter else {}),
        "artifact": artifact.digest,
        "recipe": origin.recipe_digest,
        "files": [
            {"path": f.path, "size": f.size, "sha256": f.sha256}
            | ({"blob_id": blob_ids[f.path]} if f.path in blob_ids else {})
            for f in files
        ],
        "beside": sorted(file.path for file in release_files),
        "gates": public(list(gates)),
        "provenance": public({stage: record.published for stage, record in provenance.items()}),
    }
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _named(revision: Revision) -> dict[str, object]:
    return {"repo_id": revision.repo_id, "sha": revision.sha} | ({"local": True} if revision.is_local else {})
