"""Fixtures: a local store, a remote store with a local cache, fake package versions."""

from __future__ import annotations

import contextlib
import io
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from requant.tasks.store import Store
from requant.tasks.store.folder import FolderBackend
from requant.tasks.texts import rendering, rendering_child
from tests.factories.stores import Install, Remote


@pytest.fixture
def store(tmp_path: Path) -> Store:
    backend = FolderBackend(tmp_path / "store")
    backend.check()
    return Store(backend, cache=backend)


@pytest.fixture
def far(tmp_path: Path) -> Store:
    made = Store(Remote(tmp_path / "remote"), cache=FolderBackend(tmp_path / "near"))
    made.check()
    return made


@pytest.fixture
def quick_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render texts in this process instead of new ones, which import transformers for 2 s each."""
    import torch  # noqa: F401 (a process that renders texts hides torch from transformers unless it is imported)

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        with contextlib.redirect_stdout(io.StringIO()) as written:
            status = rendering_child.main(*command[3:])
        return subprocess.CompletedProcess(command, status, written.getvalue().encode(), b"")

    itself = {"DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(rendering, "subprocess", SimpleNamespace(run=run, **itself))
    monkeypatch.setattr(rendering_child.resource, "setrlimit", lambda *_: None)  # memory of a process of its own


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make other versions of packages the installed ones: real metadata, in front of the environment's own."""

    def do(**versions: str) -> None:
        for name, version in versions.items():
            folder = tmp_path / "site" / f"{name}-{version}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return do
