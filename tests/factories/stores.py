"""Stores of unit tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tasks.store.folder import FolderBackend

Install = Callable[..., None]


class Remote(FolderBackend):
    """A place elsewhere: the file that was sent stays where it is."""

    def put_file(self, key: str, path: Path, *more: str) -> None:
        copy = path.with_name(f"{path.name}.sent")
        shutil.copyfile(path, copy)
        super().put_file(key, copy)
