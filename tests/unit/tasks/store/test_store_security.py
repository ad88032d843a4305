"""Names from outside stay inside, nothing planted is followed, nothing handed out can be run or replaced by others."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from requant.tasks.artifact import File, Manifest, check_relative, file_of
from requant.tasks.errors import CheckpointError, RequantError, StoreError
from requant.tasks.store import Store
from requant.tasks.store.folder import FolderBackend, make_folder
from requant.tasks.store.gc import Policy, collect
from requant.tasks.store.resume import download_resume
from requant.tasks.store.s3 import S3Backend
from requant.tasks.store.store import blob_key
from tests.factories.stores import every_operation, keep

KEY = "a" * 64
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_bytes(b"mine")
    return folder


LONG = ["n" * 256, "é" * 128, "a/" * 600 + "b", "n" * 4096, "/".join(["n" * 200] * 20)]


@pytest.mark.parametrize("name", LONG)
def test_a_name_without_room_on_a_file_system_or_in_s3_is_refused_by_a_sentence(name: str, store: Store) -> None:
    for refused in (
        lambda: check_relative(name),
        lambda: Manifest.of([File(name, 0, EMPTY)]),
        lambda: store.cache.path(name),
    ):
        with pytest.raises(CheckpointError, match="is not allowed") as caught:
            refused()
        assert len(str(caught.value)) < 300


def test_the_longest_name_that_is_allowed_can_be_stored_and_laid_out(store: Store, tmp_path: Path) -> None:
    longest = "n" * 255
    manifest = keep(store, KEY, {"short": b"x"})
    renamed = Manifest.of([File(longest, 1, manifest["short"].sha256)])
    assert (store.link_files(renamed, tmp_path / "out") / longest).read_bytes() == b"x"
    assert (store.checkout(renamed, tmp_path / "own") / longest).read_bytes() == b"x"
    store.backend.write(longest, b"small")
    (tmp_path / "file").write_bytes(b"large")
    store.backend.put_file(longest, tmp_path / "file")
    assert store.backend.read(longest) == b"large"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.safetensors", "Model.safetensors"),
        ("a/README.md", "A/readme.md"),
        ("straße", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
    ],
)
def test_two_names_that_are_one_file_where_case_is_ignored_are_refused(one: str, other: str) -> None:
    with pytest.raises(CheckpointError, match="stands twice"):
        Manifest.of([File(one, 0, EMPTY), File(other, 0, EMPTY)])


@pytest.fixture(scope="module")
def bucket() -> S3Backend:
    """A bucket that does not exist."""
    return S3Backend("bucket", "prefix", retry_s=0)


@pytest.mark.parametrize("key", ["../other/x", "a/../../x", "/x", "", "a\\..\\x", "a\0b", "a/./b", "n" * 4096])
def test_no_key_leaves_the_prefix_of_a_bucket(key: str, bucket: S3Backend, tmp_path: Path) -> None:
    """Nothing is sent: no server is asked."""
    for operation in every_operation(bucket, key, tmp_path):
        with pytest.raises(CheckpointError, match="is not allowed"):
            operation()


@pytest.mark.parametrize("planted", ["blobs", "blobs/sha256", "blobs/sha256/e3", blob_key(EMPTY)])
def test_a_link_planted_in_the_store_is_never_followed(store: Store, outside: Path, planted: str) -> None:
    link = store.cache.root / planted
    make_folder(link.parent)
    link.symlink_to(outside / "file" if planted.endswith(EMPTY) else outside)
    (outside / "new").write_bytes(b"")
    operations = (
        lambda: store.backend.read(blob_key(EMPTY)),
        lambda: store.backend.write(blob_key(EMPTY), b"x"),
        lambda: store.backend.write_new(blob_key(EMPTY), b"x"),
        lambda: store.backend.size(blob_key(EMPTY)),
        lambda: store.backend.delete(blob_key(EMPTY)),
        lambda: store.put_blob(outside / "new", File("new", 0, EMPTY)),
    )
    for operation in operations:
        with pytest.raises(StoreError, match="is a symbolic link"):
            operation()
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"file": b"mine", "new": b""}


def test_gc_follows_no_link_out_of_the_store(store: Store, outside: Path) -> None:
    old = outside / "sha256" / "aa"
    old.mkdir(parents=True)
    (old / ("a" * 64)).write_bytes(b"old")
    os.utime(old / ("a" * 64), (1, 1))
    make_folder(store.cache.root / "blobs")
    (store.cache.root / "blobs" / "sha256").symlink_to(outside / "sha256")
    collect(store, Policy())
    assert (old / ("a" * 64)).read_bytes() == b"old"
    (store.cache.root / "work").symlink_to(outside)
    with pytest.raises(StoreError, match="is a symbolic link"):
        collect(store, Policy())
    assert (outside / "file").exists()


def test_gc_follows_no_link_out_of_the_local_cache(far: Store, outside: Path) -> None:
    os.utime(outside / "file", (1, 1))
    (far.cache.root / "blobs").symlink_to(outside)
    with pytest.raises(StoreError, match="is a symbolic link"):
        collect(far, Policy())
    assert (outside / "file").read_bytes() == b"mine"


def test_a_file_in_whose_place_a_link_lies_is_not_taken_for_ours(store: Store, outside: Path) -> None:
    work = store.work_folder("quantize", KEY)
    (work / "file").symlink_to(outside / "file")
    before = (outside / "file").stat()
    with pytest.raises(StoreError, match="is a symbolic link"):
        store.put_blob(work / "file", file_of(work, "file"))
    assert (outside / "file").stat() == before and not list(store.backend.keys("blobs"))


@pytest.mark.parametrize("how", ["link_files", "checkout"])
def test_nothing_is_laid_out_through_a_link_in_the_folder(
    store: Store, tmp_path: Path, outside: Path, how: str
) -> None:
    manifest = keep(store, KEY, {"sub/file": b"theirs"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(outside)
    with pytest.raises(StoreError, match="is a symbolic link"):
        getattr(store, how)(manifest, tmp_path / "out")
    assert (outside / "file").read_bytes() == b"mine"


def test_a_link_in_place_of_the_checkouts_beside_a_store_is_not_followed(
    store: Store, tmp_path: Path, outside: Path
) -> None:
    manifest = keep(store, KEY, {"file": b"theirs"})
    (store.cache.root / "checkouts").mkdir()
    (store.cache.root / "checkouts" / manifest.digest).symlink_to(outside)
    with pytest.raises(StoreError, match="is a symbolic link"):
        store.link_files(manifest, store.checkout_folder(manifest))
    assert (outside / "file").read_bytes() == b"mine"


def test_carried_work_names_no_file_outside_its_folder(tmp_path: Path, outside: Path) -> None:
    far = Store(FolderBackend(tmp_path / "remote"), cache=FolderBackend(tmp_path / "near"))
    far.backend.write("resume/quantize/k/index", b'{"../outside/file": [9, ""]}')
    with pytest.raises(RequantError, match="not allowed"):
        download_resume(far, "quantize", "k", tmp_path / "work", lambda folder, paths: True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "sub").symlink_to(outside)
    far.backend.write("resume/quantize/k/index", b'{"sub/file": [9, ""]}')
    with pytest.raises(StoreError, match="is a symbolic link"):
        download_resume(far, "quantize", "k", tmp_path / "work", lambda folder, paths: True)
    assert (outside / "file").read_bytes() == b"mine"


def test_nothing_that_is_handed_out_can_be_executed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "run.sh").chmod(0o777)
    file = File("run.sh", 10, "a8076d3d28d21e02012b20eaf7dbf75409a6277134439025f282e368e3305abf")
    store.put_blob(tmp_path / "run.sh", file)
    manifest = Manifest.of([file])
    for folder in (store.link_files(manifest, tmp_path / "out"), store.checkout(manifest, tmp_path / "own")):
        assert (folder / "run.sh").stat().st_mode & 0o111 == 0


@pytest.mark.parametrize("folder", ["", "blobs", "artifacts"])
def test_a_store_that_every_user_may_write_to_is_refused_with_its_remedy(store: Store, folder: str) -> None:
    path = store.cache.root / folder
    path.mkdir(exist_ok=True)
    path.chmod(0o777)
    with pytest.raises(StoreError, match=r"every user .* run `chmod -R o-w ") as caught:
        store.check()
    assert str(path) in str(caught.value)
    path.chmod(0o770)
    store.check()


def test_a_link_to_a_folder_that_every_user_may_write_to_is_told_from_a_folder_of_ours(
    store: Store, outside: Path
) -> None:
    outside.chmod(0o777)
    (store.cache.root / "work").symlink_to(outside)
    with pytest.raises(StoreError, match="is a symbolic link") as caught:
        store.check()
    assert "chmod" not in str(caught.value)  # which would go through the link


def test_a_store_made_under_a_careless_umask_is_not_writable_by_everyone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        backend = FolderBackend(tmp_path / "store")
        backend.check()
        opened = Store(backend, cache=backend)
        keep(opened, KEY, {"sub/a": b"1"})
        opened.work_folder("quantize", KEY)
        opened.check()
    finally:
        os.umask(before)
    writable = [path for path in backend.root.rglob("*") if path.stat().st_mode & stat.S_IWOTH]
    assert writable == []
