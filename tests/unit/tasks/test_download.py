"""download: the parts that need no Hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from requant.tasks import download as downloading
from requant.tasks.artifact import git_blob_id
from requant.tasks.download import download, download_key, find_base
from requant.tasks.errors import CheckpointError, HubUnavailable
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.recipe.base_section import Base
from requant.tasks.store import Store
from tests.factories.pico import pico_base

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


@pytest.mark.parametrize("large", [True, False], ids=["by sha256", "by git blob id"])
def test_what_arrives_altered_is_thrown_away_and_what_arrives_whole_is_kept(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    whole = tmp_path / "whole"
    whole.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    file = HubFile("file", 7, git_blob_id(whole), sha256 if large else None)
    base = Revision("a/b", SHA, (file,))
    arrived: list[Path] = []

    def fetch(of: Revision, file: HubFile, path: Path, *_: object) -> str:
        data = b"weights" if arrived else b"weighty"
        path.write_bytes(data)
        arrived.append(path)
        return hashlib.sha256(data).hexdigest()

    monkeypatch.setattr(downloading, "fetch", fetch)
    with pytest.raises(HubUnavailable, match=r"file of a/b@.* arrived altered"):
        download(store, base)
    assert not arrived[0].exists()
    (kept,) = download(store, base).manifest.files
    assert (kept.path, kept.sha256) == ("file", sha256)


def test_a_folder_of_something_else_is_refused_before_it_is_hashed(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    pico_base(tmp_path / "all" / "tuned")
    with pytest.raises(
        CheckpointError, match=r"has its checkpoint in the folder tuned, not at its top: name that folder$"
    ):
        find_base(store, Base(folder=str(tmp_path / "all")))
    assert "hashing" not in caplog.text
