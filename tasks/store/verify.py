"""Checks a store: is everything there that its manifests name?"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tasks.artifact import File, Manifest
from tasks.errors import StoreError
from tasks.store.store import Store, blob_key


def verify(store: Store, *, deep: bool = False) -> tuple[int, list[str]]:
    """The number of blobs looked at, and a sentence for each that is missing, cut or (deep) altered."""
    problems: list[str] = []
    seen: dict[str, bool] = {}
    for name in store.backend.keys("artifacts"):
        try:
            manifest = Manifest.from_json(store.backend.read(name) or b"")
        except StoreError as error:
            problems.append(f"{name}: {error}")
            continue
        for file in manifest.files:
            if file.sha256 not in seen:
                seen[file.sha256] = _good(store, file, deep)
            if not seen[file.sha256]:
                problems.append(f"{name}: {file.path} ({file.sha256[:12]}) is missing or damaged")
    return len(seen), problems


def _good(store: Store, file: File, deep: bool) -> bool:
    if not store.has_blob(file):
        return False
    if not deep:
        return True
    with tempfile.TemporaryDirectory(dir=store.near.root) as folder:
        copy = Path(folder) / "blob"
        return store.backend.get_file(blob_key(file.sha256), copy) == file.sha256
