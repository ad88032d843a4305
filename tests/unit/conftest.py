"""Stores that several files of tests use: one that is local, and one elsewhere with a near cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tasks.store import Store
from tasks.store.folder import FolderBackend


class Remote(FolderBackend):
    """A place elsewhere: the file that was sent stays where it is."""

    def put_file(self, key: str, path: Path, *more: str) -> None:
        copy = path.with_name(f"{path.name}.sent")
        shutil.copyfile(path, copy)
        super().put_file(key, copy)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    backend = FolderBackend(tmp_path / "store")
    backend.check()
    return Store(backend, near=backend)


@pytest.fixture
def far(tmp_path: Path) -> Store:
    made = Store(Remote(tmp_path / "remote"), near=FolderBackend(tmp_path / "near"))
    made.check()
    return made
