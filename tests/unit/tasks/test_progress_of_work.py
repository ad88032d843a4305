"""Work that takes long says how far it is, and comes to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from requant.tasks import progress
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.hub.verify import verify_folder
from requant.tasks.store import Store
from requant.tasks.store.catalog import read_catalog
from requant.tasks.store.copy import copy
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.verify import verify_store
from tests.factories.paths import TINY
from tests.factories.stores import keep

KEY = "a" * 64


def copy_store(store: Store, folder: Path) -> None:
    (backend := FolderBackend(folder / "other")).check()
    copy(store, Store(backend, cache=backend), read_catalog(store).entries.values())


def checkout(store: Store, folder: Path) -> None:
    manifest = store.manifest("quantize", KEY)
    assert manifest is not None
    store.checkout(manifest, folder / "checkout")


WORK: dict[str, tuple[Callable[[Store, Path], object], str, int | None]] = {
    "store verify": (lambda store, folder: verify_store(store), "files", 2),
    "store verify --deep": (lambda store, folder: verify_store(store, deep=True), "bytes", 3),
    "store export": (copy_store, "bytes", 3),
    "store checkout": (checkout, "bytes", 3),
    "verify FOLDER": (lambda store, folder: verify_folder(TINY), "bytes", None),
    "inspect --deep": (lambda store, folder: inspect_checkpoint(TINY, deep=True), "bytes", None),
}


@pytest.mark.parametrize("name", WORK)
def test_long_work_is_counted_to_its_end(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[progress._Count] = []

    class Seen(progress._Count):
        def __init__(self, name: str, total: int, unit: progress.Unit) -> None:
            super().__init__(name, total, unit)
            counts.append(self)

    monkeypatch.setattr(progress, "_Count", Seen)
    keep(store, KEY, {"a": b"1", "sub/b": b"22"})
    work, unit, total = WORK[name]
    work(store, tmp_path)
    (count,) = counts
    assert count.unit == unit
    assert count.done == count.total > 0
    assert total in {None, count.total}
