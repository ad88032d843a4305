"""download: the files of one commit, by sha256.

What the store already has is not fetched again, so a new revision that changed two shards moves two shards. A file
comes straight to where its blob will be, on one disk and once; a killed download goes on in the middle of a file.
"""

from __future__ import annotations

import contextvars
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from prefect import task

from requant.tasks.artifact import File, Manifest, git_blob_id
from requant.tasks.errors import HubUnavailable
from requant.tasks.hub.fetch import fetch
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.pipeline.prefect import options, stage_summary
from requant.tasks.pipeline.stage import Made, Stage, StageResult, run_stage
from requant.tasks.store import Store, open_store
from requant.tasks.store.folder import inside
from requant.tasks.texts.text import Text, has_rows

STAGE = Stage("download", 1)
PARALLEL_DOWNLOADS = 4
log = logging.getLogger(__name__)


def download_key(base: Revision) -> str:
    return STAGE.key(reads={"base": f"{base.repo_type}:{base.name}"}, settings={})


def download(store: Store, base: Revision) -> StageResult:
    """Bring every wanted file of a commit into the store. Raises HubError, HubUnavailable or DiskFull."""

    def work(folder: Path) -> Made:
        base.check_names()
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            contexts = [contextvars.copy_context() for _ in base.wanted]  # so that threads log into the run at hand
            have = partial(_have, store, base, folder)
            fetched = list(pool.map(lambda file, context: context.run(have, file), base.wanted, contexts))
        moved = sum(file.size for file, was_here in fetched if not was_here)
        manifest = Manifest.of(file for file, _ in fetched)
        return Made(manifest, {"base": {"repo_id": base.repo_id, "sha": base.sha}, "bytes_moved": moved})

    return run_stage(store, STAGE, download_key(base), work)


def _have(store: Store, base: Revision, folder: Path, file: HubFile) -> tuple[File, bool]:
    """The file, and whether the store already had it."""
    known = _known(store, file)
    if known is not None:
        return known, True
    path = inside(folder, file.path)
    got = File(file.path, file.size, fetch(base, file, path))
    if (got.sha256 != file.sha256) if file.sha256 else (git_blob_id(path) != file.blob_id):
        path.unlink()
        raise HubUnavailable(
            f"{file.path} of {base.name} arrived altered (sha256 {got.sha256[:12]}): it was thrown away, try again"
        )
    store.put_blob(path, got)
    if not file.sha256:
        store.put_fact("git-blobs", file.blob_id, got.sha256)
    log.info(f"fetched {file.path}, {got.size:,} bytes")
    return got, False


def _known(store: Store, file: HubFile) -> File | None:
    """The file if the store has it."""
    sha256 = file.sha256 or store.get_fact("git-blobs", file.blob_id)
    known = File(file.path, file.size, sha256) if sha256 is not None else None
    return known if known is not None and store.has_blob(known) else None


def text_files(store: Store, text: Text, folder: Path) -> list[Path]:
    """The files of a text that have rows; a data set's files are brought into the store, and laid into `folder`."""
    if text.path is not None:
        return [text.path]
    assert text.dataset is not None
    manifest = download(store, text.dataset).manifest
    store.link_files(manifest, folder)
    return [folder / file.path for file in manifest.files if has_rows(file.path)]


@task(**options("download", hours=12))
def download_task(base: Revision) -> Any:
    return stage_summary(download(open_store(), base))
