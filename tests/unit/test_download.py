"""download: the parts that need no Hub."""

from __future__ import annotations

from pathlib import Path

from tasks.artifact import file_of
from tasks.download import download_key, peak_disk
from tasks.hub.revision import HubFile, Revision
from tasks.store import open_store

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


def test_a_download_needs_the_disk_once_for_what_the_store_lacks(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "here").write_bytes(b"here")
    here = file_of(tmp_path, "here")
    store.put_blob(tmp_path / "here", here)
    files = (
        HubFile("here.safetensors", 4, "a" * 40, here.sha256),
        HubFile("there.safetensors", 5000, "b" * 40, "c" * 64),
        HubFile("config.json", 20, "d" * 40, None),
        HubFile("pytorch_model.bin", 7000, "e" * 40, "f" * 64),  # never fetched
    )
    assert peak_disk(Revision("a/b", SHA, files), store) == 5020
