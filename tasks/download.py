"""The stage download: copy the files of one commit from the Hub, or of a folder, into the store.

Files that the store has already are not fetched again: if a new revision changed two shards, two shards are fetched. A
file is written once, on the disk of the store. A killed download goes on in the middle of a file.
"""

from __future__ import annotations

import contextvars
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import is_offline_mode

from requant.tasks.artifact import File, Manifest, StageKey, git_blob_id
from requant.tasks.checkpoint.other_kinds import explain_folder
from requant.tasks.errors import HubUnavailable
from requant.tasks.hub.cached import known_commit
from requant.tasks.hub.client import hub_errors, offline_variable
from requant.tasks.hub.fetch import fetch
from requant.tasks.hub.revision import HubFile, Revision, find_revision
from requant.tasks.local_base import changed, find_local_base
from requant.tasks.pipeline.stage import Made, Stage, StageResult, run_stage
from requant.tasks.progress import Bar, progress
from requant.tasks.recipe.base_section import Base
from requant.tasks.store import Store
from requant.tasks.store.folder import inside

STAGE = Stage("download", 1)
PARALLEL_DOWNLOADS = 8
MAX_GIT_BYTES = 16 << 20  # larger files are in LFS: the Hub takes at most 10 MB without it
log = logging.getLogger(__name__)


def download_key(base: Revision) -> StageKey:
    """Return the key of a commit, and of its files if a cache has them, which may have only some.

    A base in a folder has the key of its files alone, wherever they lie.
    """
    if base.is_local:
        assert base.sha, "a plan alone may leave a folder unhashed"
        return STAGE.key(reads={"base": f"local:{base.sha}"}, settings={})
    cached = {"cached": replace(base, adapter=None).content} if base.folder is not None else {}
    return STAGE.key(reads={"base": f"{base.repo_type}:{base.name}", **cached}, settings={})


def find_base(store: Store, base: Base, hash_limit_bytes: int | None = None) -> Revision:
    """Resolve a recipe's base to its commit and files, on the Hub or in a folder.

    `hash_limit_bytes` is for a base in a folder. Raises what `find_repo` or `find_local_base` raises, and
    CheckpointError if the folder is known to be something else than a checkpoint.
    """
    if base.folder is not None:
        return find_local_base(store, base, hash_limit_bytes, check=explain_folder)
    return find_repo(store, base.name, base.revision)


def find_repo(store: Store, repo_id: str, revision: str) -> Revision:
    """Resolve a model's repo to its commit and files.

    While the Hub is switched off (HF_HUB_OFFLINE), they come from the store if they were downloaded into it, the commit
    is known here, and this machine has all of its files, otherwise from the cache of huggingface_hub. Raises HubError,
    HubUnavailable.
    """
    stored = _stored_base(store, repo_id, revision) if is_offline_mode() else None
    return stored or find_revision(repo_id, revision)


def _stored_base(store: Store, repo_id: str, revision: str) -> Revision | None:
    with hub_errors(repo_id, revision):
        sha = known_commit(repo_id, revision, "model")
    manifest = store.manifest(STAGE.name, download_key(Revision(repo_id, sha, ()))) if sha else None
    if sha is None or manifest is None:
        return None
    paths = {file: store.local_path(file) for file in manifest.files}
    files = tuple(_as_listed(store, file, path) for file, path in paths.items() if path is not None)
    if len(files) < len(paths):
        log.info(f"{offline_variable()}: {store.url} has {repo_id}@{revision}, and this machine has not all of it")
        return None  # headers are read from files of this machine or of the Hub
    log.info(f"{offline_variable()}: {repo_id}@{revision} is {sha} in the store {store.url}")
    return Revision(repo_id, sha, files)


def _as_listed(store: Store, file: File, path: Path) -> HubFile:
    """Return a file as the Hub lists it: with its git blob id alone if it is not in LFS, as `download` has noted."""
    blob_id = git_blob_id(path) if file.size <= MAX_GIT_BYTES else ""
    if blob_id and store.get_fact("git-blobs", blob_id) == file.sha256:
        return HubFile(file.path, file.size, blob_id, None)
    return HubFile(file.path, file.size, "", file.sha256)


def download(store: Store, base: Revision) -> StageResult:
    """Copy all wanted files of a commit into the store. Raises HubError, HubUnavailable or DiskFull."""

    def work(folder: Path) -> Made:
        base.check_names()
        name = "copy" if base.is_local else "download"
        with progress(name, base.size, "bytes") as bar, ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            contexts = [contextvars.copy_context() for _ in base.wanted]  # In them, threads log to the current run.
            fetch_file = partial(fetch_unless_stored, store, base, folder, bar)
            files = list(pool.map(lambda file, context: context.run(fetch_file, file), base.wanted, contexts))
        fetched_bytes = sum(file.size for file, was_stored in files if not was_stored)
        manifest = Manifest.of(file for file, _ in files)
        return Made(manifest, {"base": {"repo_id": base.repo_id, "sha": base.sha}, "bytes_moved": fetched_bytes})

    return run_stage(store, STAGE, download_key(base), work)


def fetch_unless_stored(store: Store, base: Revision, folder: Path, bar: Bar, file: HubFile) -> tuple[File, bool]:
    """Return the file, and whether the store had it already. Raises HubUnavailable if it arrives altered."""
    stored = _stored(store, file)
    if stored is not None:
        bar.advance(file.size)
        return stored, True
    path = inside(folder, file.path)
    try:
        fetched = File(file.path, file.size, fetch(base, file, path, bar.advance))
    except FileNotFoundError as error:
        if base.folder is None:
            raise
        raise changed(base.folder / file.path) from error
    if base.folder is not None and base.is_local and fetched.sha256 != file.sha256:
        path.unlink()
        raise changed(base.folder / file.path)
    if (fetched.sha256 != file.sha256) if file.sha256 else (git_blob_id(path) != file.blob_id):
        path.unlink()
        raise HubUnavailable(
            f"{file.path} of {base.name} arrived altered (sha256 {fetched.sha256[:12]}): it was thrown away, try again",
            repo_id=base.repo_id,
        )
    store.put_blob(path, fetched)
    if not file.sha256:
        store.put_fact("git-blobs", file.blob_id, fetched.sha256)
    log.info(f"{'copied' if base.is_local else 'fetched'} {file.path}, {fetched.size:,} bytes")
    return fetched, False


def _stored(store: Store, file: HubFile) -> File | None:
    """Return the file if the store has it. The store remembers the sha256 of files for which the Hub gives none."""
    sha256 = file.sha256 or store.get_fact("git-blobs", file.blob_id)
    stored = File(file.path, file.size, sha256) if sha256 is not None else None
    return stored if stored is not None and store.has_blob(stored) else None
