"""Fixtures: a local store, a remote store with a near cache, fake package versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import rendering
from tasks.store import Store
from tasks.store.folder import FolderBackend
from tests.factories import children
from tests.factories.paths import TINY
from tests.factories.stores import Install, Remote


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


@pytest.fixture(scope="session")
def _transformers_loaded() -> None:
    import transformers

    transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def quick_rendering(_transformers_loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Render texts in forks of this process instead of new ones, which import transformers for 2 s each."""
    monkeypatch.setattr(rendering, "subprocess", children)


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
