"""Releases of pico checkpoints: what a run would hand to the Hub, without a run."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from infra.dev.hub.launch import HubStandIn
from requant.tasks.artifact import CARD, RECIPE, RELEASE, REPORT, File, Manifest, file_of, git_blob_id, git_blob_id_of
from requant.tasks.hub.manifest import Origin, release_document, tag_of
from requant.tasks.hub.release import Release, release
from requant.tasks.hub.revision import Revision
from requant.tasks.recipe.recipe import Publish
from requant.tasks.record import StageRecord
from tests.factories.pico import pico_base

BASE = "demo/pico"
TARGET = "me/released"


@dataclass(frozen=True)
class Made:
    """A folder ready to be released: an artifact's files, and beside them card, recipe, report and `requant.json`."""

    folder: Path
    base: Revision
    manifest: Manifest
    beside: tuple[str, ...]
    bits: int

    @property
    def tag(self) -> str:
        return tag_of(self.base.sha, self.manifest.digest)

    @property
    def names(self) -> set[str]:
        """What the repo holds then."""
        return {*(f.path for f in self.manifest.files), *self.beside, ".gitattributes"}

    def publish(self, **settings: Any) -> Release:
        asked = Publish.model_validate({"repo_id": TARGET, **settings})
        return release(asked, self.base, self.folder, self.manifest, self.beside, bits=self.bits)


def made(folder: Path, seed: int, *, files: Mapping[str, bytes] | None = None, bits: int = 4, **base: Any) -> Made:
    """A release of the base's commit number `seed`: other weights for each."""
    pico_base(folder, seed=seed)
    (folder / CARD).unlink()
    for path, data in (files or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = Manifest.of(file_of(folder, path) for path in paths)
    revision = Revision(**{"repo_id": BASE, "sha": f"{seed:040x}"[::-1], "files": (), **base})
    beside = {
        CARD: f"---\nlicense: mit\n---\n# release {seed}\n".encode(),
        RECIPE: b"base: {repo_id: demo/pico}\n",
        REPORT: b"# report\n",
        "pictures/losses.png": b"\x89PNG of " + str(seed).encode(),
    }
    beside[RELEASE] = release_document(
        origin=Origin(revision, "e" * 64, "0.1.0"),
        artifact=manifest,
        release_files=[File(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in beside.items()],
        blob_ids={path: git_blob_id(folder / path) for path in paths}
        | {path: git_blob_id_of(data) for path, data in beside.items()},
        gates=[{"name": "structure", "value": 0.0, "limit": 0.0, "passed": True}],
        provenance={"quantize": StageRecord({"scheme": {"bits": bits, "group_size": 128, "sym": True}})},
    )
    for path, data in beside.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    return Made(folder, revision, manifest, tuple(beside), bits)


def edited(document: bytes, **changes: Any) -> bytes:
    """A `requant.json` that says something else."""
    return json.dumps({**json.loads(document), **changes}).encode()


def edit(api: HfApi, path: str = "README.md", data: bytes | None = b"# by hand\n") -> None:
    """What a person does on the Hub's page."""
    operation = CommitOperationDelete(path) if data is None else CommitOperationAdd(path, data)
    api.create_commit(TARGET, [operation], commit_message="By hand")


def titles(api: HfApi) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(TARGET)]


def card_on_hub(api: HfApi) -> str:
    with tempfile.TemporaryDirectory() as cache:
        return Path(api.hf_hub_download(TARGET, "README.md", cache_dir=cache)).read_text()


def sent(hub: HubStandIn) -> int:
    """Bytes of large files that were sent to the Hub."""
    return sum(e["bytes_in"] for e in hub.traffic() if e["path"].startswith("/_lfs/") and e["method"] == "PUT")
