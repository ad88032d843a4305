"""Unfinished work in the store: what one machine has finished of a stage, for another to carry on with.

`resume/<stage>/<key>/files/<path>` are the files of a work folder that never change once they are there, and
`resume/<stage>/<key>/index` lists those of them that belong together; it is written last. A store in a local folder has
its work folders in itself, so that there is nothing to copy.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tasks.store.background import repeated
from tasks.store.folder import inside
from tasks.store.store import Store

PAUSE = 1.0  # seconds between two looks at the folder
# What belongs together now: paths relative to the work folder, those that may change last.
Snapshot = Callable[[Path], list[str]]


def prefix(stage: str, key: str) -> str:
    return f"resume/{stage}/{key}"


def restore(store: Store, stage: str, key: str, folder: Path, worth: Callable[[Path, list[str]], bool]) -> int:
    """Fetch what another machine left, if `worth(folder, paths)`; how many files came."""
    if store.is_local:
        return 0
    text = store.backend.read(f"{prefix(stage, key)}/index")
    try:
        sizes = {str(path): int(size) for path, size in json.loads(text or b"{}").items()}
    except (ValueError, AttributeError, TypeError):
        return 0
    if not sizes or not worth(folder, list(sizes)):
        return 0
    fetched = 0
    for path, size in sizes.items():
        target = inside(folder, path)
        if target.exists() and target.stat().st_size == size:
            continue
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        arriving = target.with_name(f"{target.name}.part")
        arriving.unlink(missing_ok=True)
        store.backend.get_file(f"{prefix(stage, key)}/files/{path}", arriving)
        os.replace(arriving, target)
        fetched += 1
    return fetched


@contextlib.contextmanager
def kept(store: Store, stage: str, key: str, folder: Path, snapshot: Snapshot) -> Iterator[None]:
    """Copy what `snapshot` names into the store while the work goes on, and once more when it ends, well or not."""
    if store.is_local:
        yield
        return
    sent: dict[str, int] = {}

    def keep() -> None:
        push(store, stage, key, folder, snapshot(folder), sent)

    with repeated(keep, PAUSE, "what is finished could not be copied to the store"):
        yield


def push(store: Store, stage: str, key: str, folder: Path, paths: list[str], sent: dict[str, int]) -> None:
    """Copy the files at `paths` that were not `sent` yet, then the index. A small one may change and is sent again."""
    sizes: dict[str, int] = {}
    changed = False
    for path in paths:
        source = folder / path
        sizes[path] = source.stat().st_size
        small = source.suffix == ".json"
        if sent.get(path) == sizes[path] and not small:
            continue
        name = f"{prefix(stage, key)}/files/{path}"
        if small:
            data = source.read_bytes()
            sizes[path] = len(data)
            if sent.get(path) == hash(data):
                continue
            store.backend.write(name, data)
            sent[path] = hash(data)
        else:
            store.backend.put_file(name, source)  # S3: uploaded, the file stays
            sent[path] = sizes[path]
        changed = True
    if changed:
        store.backend.write(f"{prefix(stage, key)}/index", json.dumps(sizes).encode())


def sweep(store: Store, stage: str, key: str) -> None:
    """Forget the unfinished work of a stage key: its artifact is there."""
    if not store.is_local:
        for name in list(store.backend.keys(prefix(stage, key))):
            store.backend.delete(name)
