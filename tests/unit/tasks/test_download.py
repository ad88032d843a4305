"""download: the parts that need no Hub."""

from __future__ import annotations

import pytest

from tasks.download import download, download_key
from tasks.errors import CheckpointError
from tasks.hub.revision import HubFile, Revision
from tasks.store import Store

SHA = "0123456789abcdef0123456789abcdef01234567"


def test_a_download_is_keyed_by_repo_type_and_commit_and_by_nothing_else() -> None:
    one = HubFile("config.json", 2, "b" * 40, None)
    base = Revision("a/b", SHA, (one,))
    assert download_key(base) == download_key(Revision("a/b", SHA, ()))
    others = {
        download_key(Revision("a/c", SHA, (one,))),
        download_key(Revision("a/b", SHA[::-1], (one,))),
        download_key(Revision("a/b", SHA, (one,), "dataset")),
        download_key(base),
    }
    assert len(others) == 4


def test_names_that_cannot_lie_in_one_folder_are_refused_before_anything_is_fetched(store: Store) -> None:
    files = tuple(HubFile(path, 10**9, "b" * 40, "c" * 64) for path in ("model.safetensors", "Model.safetensors"))
    with pytest.raises(CheckpointError, match="stands twice"):
        download(store, Revision("nobody/nothing", "a" * 40, files))
