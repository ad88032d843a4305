"""The store in a folder: atomic writes, read-only objects, names that stay inside."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path

import pytest

from requant.tasks.errors import CheckpointError, RequantError, StoreError
from requant.tasks.store.folder import FolderBackend, clone, link
from tests.factories.stores import every_operation


@pytest.fixture
def store(tmp_path: Path) -> FolderBackend:
    return FolderBackend(tmp_path / "store")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_an_object_is_read_as_it_was_written(store: FolderBackend) -> None:
    assert store.read("a/b") is None and store.size("a/b") is None
    store.write("a/b", b"one")
    assert (store.read("a/b"), store.size("a/b")) == (b"one", 3)
    store.write("a/b", b"other")
    assert (store.read("a/b"), store.size("a/b")) == (b"other", 5)


def test_the_first_of_two_new_writes_wins(store: FolderBackend) -> None:
    assert store.write_new("a/b", b"first") is True
    assert store.write_new("a/b", b"second") is False
    assert store.read("a/b") == b"first"


def test_of_32_threads_writing_one_new_object_exactly_one_wins(store: FolderBackend) -> None:
    start, won = threading.Barrier(32), []

    def write(number: int) -> None:
        start.wait()
        if store.write_new("race", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and store.read("race") == b"%d" % won[0]


def test_a_reader_sees_the_old_or_the_new_object_and_never_a_part(store: FolderBackend) -> None:
    values = [bytes([n]) * 100_000 for n in range(20)]
    store.write("x", values[0])
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(store.read("x"))

    thread = threading.Thread(target=read)
    thread.start()
    for value in values:
        store.write("x", value)
    done.set()
    thread.join()
    assert seen <= set(values) and seen


def test_nothing_is_left_behind_by_writes(store: FolderBackend, tmp_path: Path) -> None:
    store.write("a/b", b"1")
    store.write_new("a/b", b"2")
    (tmp_path / "file").write_bytes(b"3")
    store.put_file("a/c", tmp_path / "file")
    assert sorted(p.relative_to(store.root).as_posix() for p in store.root.rglob("*")) == ["a", "a/b", "a/c"]


def test_an_object_from_a_file_is_read_only(store: FolderBackend, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    store.put_file("blobs/x", tmp_path / "file")
    assert store.read("blobs/x") == b"data" and mode(store.path("blobs/x")) == 0o444


@pytest.mark.parametrize("how", ["write", "write_new"])
def test_a_small_object_can_be_read_by_every_user_of_the_store(store: FolderBackend, how: str) -> None:
    getattr(store, how)("artifacts/x", b"{}")
    assert mode(store.path("artifacts/x")) == 0o444


def test_keys_below_a_prefix_are_listed_whole_and_without_unfinished_files(store: FolderBackend) -> None:
    for key in ("artifacts/b/2", "artifacts/a/1", "artifacts-other/x", "blobs/y"):
        store.write(key, b"")
    (store.root / "artifacts" / "a" / ".1.unfinished").write_bytes(b"")
    assert list(store.keys("artifacts")) == ["artifacts/a/1", "artifacts/b/2"]
    assert list(store.keys("nothing")) == []


def test_an_object_can_be_deleted_twice(store: FolderBackend) -> None:
    store.write("a", b"")
    store.delete("a")
    store.delete("a")
    assert store.read("a") is None


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "", "a\0b", "a\\b"])
def test_a_key_that_leaves_the_folder_is_refused_by_every_operation(
    store: FolderBackend, key: str, tmp_path: Path
) -> None:
    for operation in every_operation(store, key, tmp_path):
        with pytest.raises(CheckpointError):
            operation()
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "store"}


def test_a_fetched_file_is_a_copy_of_its_own(store: FolderBackend, tmp_path: Path) -> None:
    store.write("a", b"data")
    store.get_file("a", tmp_path / "sub" / "copy")
    assert (tmp_path / "sub" / "copy").read_bytes() == b"data"
    (tmp_path / "sub" / "copy").write_bytes(b"changed")
    assert store.read("a") == b"data"


def test_a_copy_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(FileExistsError):
        clone(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"b"


def test_a_link_across_file_systems_is_a_read_only_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"data")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link(tmp_path / "a", tmp_path / "far" / "b")
    assert (tmp_path / "far" / "b").read_bytes() == b"data" and mode(tmp_path / "far" / "b") == 0o444
    assert (tmp_path / "a").stat().st_ino != (tmp_path / "far" / "b").stat().st_ino


def test_a_file_from_another_file_system_is_copied_in(
    store: FolderBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"data")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", refuse)
    store.put_file("x", tmp_path / "file")
    assert store.read("x") == b"data" and mode(store.path("x")) == 0o444


def test_a_store_that_is_a_file_cannot_be_used_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be used"):
        FolderBackend(tmp_path / "file").check()


def test_a_full_disk_is_found_at_once(store: FolderBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(RequantError, match="no room left while writing"):
        store.check()


def test_a_store_that_can_be_used_is_made_and_left_empty(store: FolderBackend) -> None:
    store.check()
    assert list(store.root.iterdir()) == []
    assert store.url == store.root.as_uri()
