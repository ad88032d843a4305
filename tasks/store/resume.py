"""Unfinished work in the store, so that another machine can resume a stage.

`resume/<stage>/<key>/files/<path>` are finished files of a work folder. `resume/<stage>/<key>/index` lists those that
belong together, with sizes and hashes, and is written last. Files do not change once they exist, except small ones.
A store in a local folder contains its work folders, so that nothing is copied.
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
from requant.tasks.background import repeated
from requant.tasks.store.folder import inside
from requant.tasks.store.store import Store

log = logging.getLogger(__name__)
POLL_S = 1.0
# Lists the finished files of a work folder by relative path. Files that may change come last.
Snapshot = Callable[[Path], list[str]]
Index = dict[str, tuple[int, str]]  # size and sha256 by path


def prefix(stage: str, key: str) -> str:
    return f"resume/{stage}/{key}"


def download_resume(
    store: Store, stage: str, key: str, folder: Path, is_worthwhile: Callable[[Path, list[str]], bool]
) -> int:
    """Download the unfinished work of another machine into `folder`, if `is_worthwhile(folder, paths)`.

    Return the number of downloaded files. It is 0 if a file arrived altered, as the rest is then of no use.
    """
    if store.is_local:
        return 0
    text = store.backend.read(f"{prefix(stage, key)}/index")
    try:
        index: Index = {
            str(path): (int(size), str(sha256)) for path, (size, sha256) in json.loads(text or b"{}").items()
        }
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return 0
    if not index or not is_worthwhile(folder, list(index)):
        return 0
    downloaded = 0
    for path, (size, sha256) in index.items():
        target = inside(folder, path)
        if target.exists() and target.stat().st_size == size:
            continue
        if not _download(store, f"{prefix(stage, key)}/files/{path}", target, sha256):
            log.warning("what another machine had finished arrived altered (%s): it is done again", path)
            return 0
        downloaded += 1
    return downloaded


def _download(store: Store, name: str, target: Path, sha256: str) -> bool:
    """Download one file. Return False if it has another sha256, also at the second attempt.

    A small file is not compared, as it may have been uploaded again after the index was written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    for _ in range(2):
        partial.unlink(missing_ok=True)
        if _is_small(target):
            partial.write_bytes(store.backend.read(name) or b"")
        elif store.backend.get_file(name, partial) != sha256:
            continue
        os.replace(partial, target)
        return True
    partial.unlink()
    return False


def _is_small(path: Path) -> bool:
    return path.suffix == ".json"


@contextlib.contextmanager
def resume_uploads(store: Store, stage: str, key: str, folder: Path, snapshot: Snapshot) -> Iterator[None]:
    """Upload the files that `snapshot` lists while the work goes on, and once more when it ends or fails."""
    if store.is_local:
        yield
        return
    uploaded: Index = {}

    def upload() -> None:
        upload_resume(store, stage, key, folder, snapshot(folder), uploaded)

    with repeated(upload, POLL_S, "what is finished could not be copied to the store"):
        yield


def upload_resume(store: Store, stage: str, key: str, folder: Path, paths: list[str], uploaded: Index) -> None:
    """Upload the files at `paths`, then the index. Files in `uploaded` are skipped, except small ones that changed.

    Add the files to `uploaded`.
    """
    index: Index = {}
    for path in paths:
        source, name, before = folder / path, f"{prefix(stage, key)}/files/{path}", uploaded.get(path)
        if _is_small(source):
            data = source.read_bytes()
            index[path] = len(data), hashlib.sha256(data).hexdigest()
            if before != index[path]:
                store.backend.write(name, data)
        elif before is not None and before[0] == source.stat().st_size:
            index[path] = before
        else:
            index[path] = source.stat().st_size, sha256_of(source)
            store.backend.put_file(name, source, index[path][1])  # leaves the file in place, as the store is not local
    if any(uploaded.get(path) != file for path, file in index.items()):
        store.backend.write(f"{prefix(stage, key)}/index", json.dumps(index).encode())
        uploaded.update(index)


def delete_resume(store: Store, stage: str, key: str) -> None:
    """Delete the unfinished work of a stage key, whose artifact now exists."""
    if not store.is_local:
        for name in list(store.backend.keys(prefix(stage, key))):
            store.backend.delete(name)
