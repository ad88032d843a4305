"""What is here already and what must be moved: the base's files by sha256, bytes to download and to upload."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from tempfile import TemporaryDirectory

from requant.tasks.artifact import File, Manifest, file_of
from requant.tasks.errors import HubError, HubUnavailable
from requant.tasks.hub.revision import HubFile, Revision, resolve
from requant.tasks.hub.sparse_checkout import fetch_files
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store

Hashes = dict[str, str | None]  # sha256 by path; None: not known yet
FETCHED_WHOLE = 16 << 20  # bytes: a file without a sha256 at the Hub is fetched to know it, and is never larger there
FETCHED_AT_MOST = 100  # such files: a base that has more is planned without, as if nothing were made of it yet


def hashes_of(store: Store, base: Revision) -> Hashes:
    """The sha256 of each file that the Hub or the store knows it of, by path."""
    return {f.path: f.sha256 or store.get_fact("git-blobs", f.blob_id) for f in base.wanted}


def base_manifest(base: Revision, hashes: Hashes, unread: Container[str]) -> Manifest | None:
    """The base's files by sha256, as download would list them, but those that no later stage reads; None where one
    whose sha256 is not known is too large to fetch, or these are too many."""
    wanted = [file for file in base.wanted if file.path not in unread]
    unknown = [file for file in wanted if hashes[file.path] is None]
    if len(unknown) > FETCHED_AT_MOST or any(file.size > FETCHED_WHOLE for file in unknown):
        return None
    with TemporaryDirectory(prefix="requant-") as temporary:
        folder = Path(temporary)
        for file in unknown:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.path).touch()
        fetch_files(base, folder, (file.path for file in unknown))
        found = {file.path: file_of(folder, file.path).sha256 for file in unknown}
    return Manifest.of(File(f.path, f.size, hashes[f.path] or found[f.path]) for f in wanted)


def local_file(store: Store, file: HubFile, hashes: Hashes) -> Path | None:
    """Where a file of the base lies on this machine, if it does."""
    sha256 = hashes.get(file.path)
    return None if sha256 is None else store.local_path(File(file.path, file.size, sha256))


def to_download(store: Store, base: Revision, hashes: Hashes) -> int:
    """Bytes of a base that the store lacks."""
    known = ((file, hashes[file.path]) for file in base.wanted)
    return sum(f.size for f, sha256 in known if not sha256 or not store.has_blob(File(f.path, f.size, sha256)))


def to_upload(recipe: Recipe, artifact: Manifest | None, planned: int) -> int:
    """Bytes that publishing sends; 0 where `main` of the target holds the artifact's weights already. planned: bytes of
    an artifact that is not made yet."""
    if recipe.publish is None or artifact is None:
        return planned if recipe.publish else 0
    try:
        there = {file.sha256 for file in resolve(recipe.publish.repo_id).files}
    except HubUnavailable:
        raise
    except HubError:  # no such repo yet, or none that this token may see
        return artifact.size
    return sum(f.size for f in artifact.files if f.path.endswith(".safetensors") and f.sha256 not in there)
