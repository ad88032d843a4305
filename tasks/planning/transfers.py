"""Find out which of the base's files are here already, and how many bytes must be downloaded and uploaded."""

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
# The Hub has no sha256 of files that it does not keep in LFS, which are small. They are fetched and hashed. A base with
# more or larger ones is planned as if the store had nothing of it.
MAX_HASHED_BYTES = 16 << 20
MAX_HASHED_FILES = 100


def known_hashes(store: Store, base: Revision) -> Hashes:
    """Return the sha256 of each file of a base by path, as the Hub or an earlier download knows it; None: not known."""
    return {f.path: f.sha256 or (store.get_fact("git-blobs", f.blob_id) if f.blob_id else None) for f in base.wanted}


def base_manifest(base: Revision, hashes: Hashes, unread: Container[str]) -> Manifest | None:
    """Return the manifest of the files of a base that later stages read, as download would write it.

    `unread` has the paths to leave out. Files without a known sha256 are fetched and hashed. The result is None if
    there are too many of these, or if one is too large.
    """
    wanted = [file for file in base.wanted if file.path not in unread]
    unknown = [file for file in wanted if hashes[file.path] is None]
    if len(unknown) > MAX_HASHED_FILES or any(file.size > MAX_HASHED_BYTES for file in unknown):
        return None
    with TemporaryDirectory(prefix="requant-") as temporary:
        folder = Path(temporary)
        for file in unknown:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.path).touch()
        fetch_files(base, folder, (file.path for file in unknown))
        hashed = {file.path: file_of(folder, file.path).sha256 for file in unknown}
    return Manifest.of(File(f.path, f.size, hashes[f.path] or hashed[f.path]) for f in wanted)


def local_path(store: Store, file: HubFile, hashes: Hashes) -> Path | None:
    """Return the path of a base's file on this machine; None if it is not here."""
    sha256 = hashes.get(file.path)
    return None if sha256 is None else store.local_path(File(file.path, file.size, sha256))


def download_bytes(store: Store, base: Revision, hashes: Hashes) -> int:
    """Count the bytes of a base that the store lacks."""
    known = ((file, hashes[file.path]) for file in base.wanted)
    return sum(f.size for f, sha256 in known if not sha256 or not store.has_blob(File(f.path, f.size, sha256)))


def upload_bytes(recipe: Recipe, artifact: Manifest | None, planned: int) -> int:
    """Count the bytes that publishing sends: the weights that `main` of the target repo does not have.

    `planned` has the bytes of the result, which count if there is no artifact yet.
    """
    if recipe.publish is None or artifact is None:
        return planned if recipe.publish else 0
    try:
        published = {file.sha256 for file in resolve(recipe.publish.repo_id).files}
    except HubUnavailable:
        raise
    except HubError:  # There is no such repo, or this token may not see it.
        return artifact.size
    return sum(f.size for f in artifact.files if f.path.endswith(".safetensors") and f.sha256 not in published)
