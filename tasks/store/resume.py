"""Unfinished work in the store: what one machine has finished of a stage, for another to carry on with.

`resume/<stage>/<key>/files/<path>` are the files of a work folder that never change once they are there, and
`resume/<stage>/<key>/index` lists those of them that belong together, with their sizes and hashes; it is written last.
A store in a local folder has its work folders in itself, so that there is nothing to copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from requant.tasks.artifact import sha256_of
from requant.tasks.store.background import repeated
from requant.tasks.store.folder import inside
from requant.tasks.store.store import Store

log = logging.getLogger(__name__)
POLL_S = 1.0  # seconds between two looks at the folder
# What belongs together now: paths relative to the work folder, those that may change last.
Snapshot = Callable[[Path], list[str]]
Index = dict[str, tuple[int, str]]  # size and sha256 by path


def prefix(stage: str, key: str) -> str:
    return f"resume/{stage}/{key}"


def download_resume(store: Store, stage: str, key: str, folder: Path, worth: Callable[[Path, list[str]], bool]) -> int:
    """Fetch what another machine left, if `worth(folder, paths)`; how many files came."""
    if store.is_local:
        return 0
    text = store.backend.read(f"{prefix(stage, key)}/index")
    try:
        index: Index = {
            str(path): (int(size), str(sha256)) for path, (size, sha256) in json.loads(text or b"{}").items()
        }
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return 0
    if not index or not worth(folder, list(index)):
        return 0
    fetched = 0
    for path, (size, sha256) in index.items():
        target = inside(folder, path)
        if target.exists() and target.stat().st_size == size:
            continue
        if not _fetch(store, f"{prefix(stage, key)}/files/{path}", target, sha256):
            log.warning("what another machine had finished arrived altered (%s): it is done again", path)
            return 0
        fetched += 1
    return fetched


def _fetch(store: Store, name: str, target: Path, sha256: str) -> bool:
    """Bring one file; False if it is not, twice, what was sent. A small one may have been sent again since."""
    target.parent.mkdir(parents=True, exist_ok=True)
    arriving = target.with_name(f"{target.name}.part")
    for _ in range(2):
        arriving.unlink(missing_ok=True)
        if _is_small(target):
            arriving.write_bytes(store.backend.read(name) or b"")
        elif store.backend.get_file(name, arriving) != sha256:
            continue
        os.replace(arriving, target)
        return True
    arriving.unlink()
    return False


def _is_small(path: Path) -> bool:
    return path.suffix == ".json"


@contextlib.contextmanager
def resume_uploads(store: Store, stage: str, key: str, folder: Path, snapshot: Snapshot) -> Iterator[None]:
    """Copy what `snapshot` names into the store while the work goes on, and once more when it ends, well or not."""
    if store.is_local:
        yield
        return
    sent: Index = {}

    def keep() -> None:
        upload_resume(store, stage, key, folder, snapshot(folder), sent)

    with repeated(keep, POLL_S, "what is finished could not be copied to the store"):
        yield


def upload_resume(store: Store, stage: str, key: str, folder: Path, paths: list[str], sent: Index) -> None:
    """Copy the files at `paths` that were not `sent` yet, then the index. A small one may change and is sent again."""
    index: Index = {}
    for path in paths:
        source, name, before = folder / path, f"{prefix(stage, key)}/files/{path}", sent.get(path)
        if _is_small(source):
            data = source.read_bytes()
            index[path] = len(data), hashlib.sha256(data).hexdigest()
            if before != index[path]:
                store.backend.write(name, data)
        elif before is not None and before[0] == source.stat().st_size:
            index[path] = before
        else:
            index[path] = source.stat().st_size, sha256_of(source)
            store.backend.put_file(name, source, index[path][1])  # S3: uploaded, the file stays
    if any(sent.get(path) != file for path, file in index.items()):
        store.backend.write(f"{prefix(stage, key)}/index", json.dumps(index).encode())
        sent.update(index)


def delete_resume(store: Store, stage: str, key: str) -> None:
    """Forget the unfinished work of a stage key: its artifact is there."""
    if not store.is_local:
        for name in list(store.backend.keys(prefix(stage, key))):
            store.backend.delete(name)
