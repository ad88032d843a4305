"""Object storage for artifacts: blobs named by their sha256, manifests named by their stage key.

store = open_checked_store()                # REQUANT_STORE: file:///dir or s3://bucket/prefix
manifest = store.manifest("quantize", key)  # an artifact whose blobs are all in the store, or None
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from requant.tasks.artifact import check_relative
from requant.tasks.errors import CheckpointError, RecipeError
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.store import Store

__all__ = ["Store", "cache_folder", "open_checked_store", "open_store"]

LOCAL_CACHE = "near"  # the folder's name on disk, which must not change: users have downloaded blobs there


def cache_folder() -> Path:
    """Return the folder for files that can be downloaded or made again: `$XDG_CACHE_HOME/requant`, or else
    `~/.cache/requant`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "requant"


def open_store(url: str | None = None) -> Store:
    """Open the store at `url`. The default is REQUANT_STORE, and without that a folder in the user's cache.

    `url` is file:///dir, s3://bucket/prefix, or the absolute path of a folder, which may begin with `~`. A relative
    path would name another store in each working directory. No server is contacted. Raises RecipeError for any other.
    """
    named = f"the address {url!r}"
    if not url:
        # pydantic takes 0.2 s to import, and `requant --help` reads no settings.
        from requant.tasks.settings import read_settings

        url = read_settings().store or (cache_folder() / "store").as_uri()
        named = f"REQUANT_STORE={url!r}"
    if url.startswith(("/", "~")):
        url = _folder_url(url, named)
    parts = urlsplit(url)
    if "?" in url or "#" in url:  # urlsplit cuts both off, which would open another store
        raise RecipeError(f"{named} is not a store: `?` and `#` have no place in it (%3F and %23 in file:///)")
    if parts.scheme == "file" and parts.path and parts.netloc in {"", "localhost"}:
        folder = FolderBackend(Path(unquote(parts.path)))
        return Store(folder, cache=folder)
    if parts.scheme == "s3" and parts.netloc and _is_prefix(parts.path.strip("/")):
        # boto3 takes 0.4 s to import.
        from requant.tasks.store.s3 import S3Backend

        return Store(S3Backend(parts.netloc, parts.path.strip("/")), cache=FolderBackend(cache_folder() / LOCAL_CACHE))
    raise RecipeError(f"{named} is not a store: use an absolute path of a folder, file:///folder or s3://bucket/prefix")


def _folder_url(path: str, named: str) -> str:
    """Return the URL of a folder. Raises RecipeError for a `~` of a user who does not exist."""
    try:
        return Path(path).expanduser().absolute().as_uri()
    except RuntimeError as error:
        raise RecipeError(f"{named} is not a store: there is no such user") from error


def open_checked_store() -> Store:
    """Open the store of REQUANT_STORE. Raises what `open_store` and `Store.check` raise."""
    store = open_store()
    store.check()
    return store


def _is_prefix(path: str) -> bool:
    """Check whether a path is a plain prefix. Some proxies resolve `..`, so that keys would lie outside of it."""
    try:
        check_relative(path or "-")
    except CheckpointError:
        return False
    return True
