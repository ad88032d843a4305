"""What killed processes left, in the store and on this machine: old ones go, and nothing that is in use."""

from __future__ import annotations

import os
from pathlib import Path

from requant.tasks.store import Store
from requant.tasks.store.gc import Policy, collect
from requant.tasks.store.store import blob_key
from tests.factories.stores import ago, keep

DAY = 86400.0
KEY = "k" * 64


def test_files_that_a_killed_writer_left_go_after_the_grace_period(store: Store) -> None:
    folder = store.cache.root / "blobs" / "sha256" / "aa"
    folder.mkdir(parents=True)
    (folder / ".half.1.2").write_bytes(b"half")
    assert collect(store, Policy()).leftovers == []
    ago(folder, 2)
    assert collect(store, Policy()).leftovers == ["blobs/sha256/aa/.half.1.2"]
    assert list(folder.iterdir()) == []


def test_work_that_nobody_went_on_with_for_a_week_goes_and_work_under_a_lease_stays(store: Store) -> None:
    old, held = store.work_folder("quantize", KEY), store.work_folder("quantize", "h" * 64)
    for folder in (old, held):
        (folder / "block-00000.safetensors").write_bytes(b"tuned")
        ago(folder, 6)
    assert collect(store, Policy()).local_files == []
    (old / "still-written").write_bytes(b"")
    ago(held, 8)
    with store.lease("quantize", "h" * 64):
        assert collect(store, Policy()).local_files == []
    ago(old, 8)
    assert {found.path for found in collect(store, Policy()).local_files} == {old, held}
    assert not old.exists() and not held.exists()


def test_carried_work_goes_after_a_week_or_once_its_artifact_is_there(store: Store, tmp_path: Path) -> None:
    for key in ("left", "held", "done"):
        store.backend.write(f"resume/quantize/{key}/index", b"{}")
        store.backend.write(f"resume/quantize/{key}/files/block", b"tuned")
    keep(store, "done", {"a": b"1"})
    ago(store.cache.root / "resume", 2)
    collect(store, Policy())
    assert {key.split("/")[2] for key in store.backend.keys("resume")} == {"left", "held"}
    ago(store.cache.root / "resume", 8)
    with store.lease("quantize", "held"):
        collect(store, Policy())
    assert {key.split("/")[2] for key in store.backend.keys("resume")} == {"held"}


def test_a_checkout_beside_a_local_store_goes_with_its_artifact(store: Store, tmp_path: Path) -> None:
    manifest = keep(store, KEY, {"a": b"weights"})
    folder = store.link_files(manifest, store.cache.root / "checkouts" / manifest.digest)
    ago(store.cache.root, 40)
    assert collect(store, Policy()).local_files == []
    plan = collect(store, Policy(older_than_s=30 * DAY))
    assert [found.path for found in plan.local_files] == [folder] and not folder.exists()


def test_the_local_cache_drops_what_nothing_names_and_what_was_not_used_for_a_month(far: Store, tmp_path: Path) -> None:
    used = keep(far, "used", {"a": b"used"})
    unused = keep(far, "unused", {"a": b"unused"})
    lost = keep(far, "lost", {"a": b"lost"})
    far.backend.delete("artifacts/quantize/lost")
    ago(far.cache.root, 40)
    far.link_files(used, tmp_path / "out")
    collect(far, Policy())
    assert far.cache.size(blob_key(used["a"].sha256)) == 4
    assert far.cache.size(blob_key(unused["a"].sha256)) is None and far.sees_blob(unused["a"])
    assert far.cache.size(blob_key(lost["a"].sha256)) is None
    assert far.read_blob(unused["a"]) == b"unused"


def test_the_local_cache_keeps_what_a_lease_needs(far: Store, tmp_path: Path) -> None:
    manifest = keep(far, KEY, {"a": b"weights"})
    ago(far.cache.root, 40)
    with far.lease("validate", KEY):
        far.need(manifest.files)
        assert collect(far, Policy()).local_files == []


def test_a_link_planted_among_work_folders_is_removed_and_what_it_points_to_stays(store: Store, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    (store.cache.root / "work").mkdir()
    link = store.cache.root / "work" / "quantize-planted"
    link.symlink_to(tmp_path / "precious")
    os.utime(link, (1, 1), follow_symlinks=False)
    ago(tmp_path / "precious", 100)
    assert [found.path for found in collect(store, Policy()).local_files] == [link]
    assert not link.is_symlink() and (tmp_path / "precious" / "file").read_bytes() == b"x"
