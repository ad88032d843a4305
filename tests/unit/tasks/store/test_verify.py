"""`requant store verify`: finds what is missing, cut or altered, and mends it without hiding anything."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from requant.tasks.artifact import Manifest
from requant.tasks.store import Store
from requant.tasks.store import lease as leases
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.lease import lease
from requant.tasks.store.store import GC, blob_key
from requant.tasks.store.verify import StoreCheck, verify_store
from tests.factories.stores import Counted, keep

KEY = "a" * 64


def alter(backend: FolderBackend, sha256: str, data: bytes) -> None:
    """Damage that a disk does: other bytes in the same file."""
    path = backend.path(blob_key(sha256))
    path.chmod(0o644)
    path.write_bytes(data)


def test_sound_blobs_are_counted_and_missing_cut_and_altered_ones_named(store: Store, tmp_path: Path) -> None:
    manifest = keep(store, KEY, {"a": b"aaaa", "b": b"bbbb", "c": b"cccc", "copy": b"aaaa"})
    sound = verify_store(store, deep=True)
    assert (sound.checked, sound.problems, sound.repairs) == (3, [], [])
    store.backend.delete(blob_key(manifest["b"].sha256))
    alter(store.cache, manifest["c"].sha256, b"CCCC")
    missing, altered = (
        f"artifacts/quantize/{KEY}: {n} ({manifest[n].sha256[:12]}) is missing or damaged" for n in "bc"
    )
    assert verify_store(store).problems == [missing]
    assert verify_store(store, deep=True).problems == [missing, altered]
    store.backend.write(f"artifacts/quantize/{'b' * 64}", b"{")
    assert verify_store(store).problems[1].startswith(f"artifacts/quantize/{'b' * 64}: a manifest in the store")


def test_without_repair_nothing_is_changed(store: Store, tmp_path: Path) -> None:
    manifest = keep(store, KEY, {"a": b"aaaa"})
    store.backend.delete(blob_key(manifest["a"].sha256))
    assert verify_store(store).repairs == []
    assert list(store.backend.keys("artifacts"))


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_what_cannot_be_put_back_is_removed_from_sight_and_made_anew(store: Store, tmp_path: Path, damage: str) -> None:
    manifest = keep(store, KEY, {"a": b"aaaa", "b": b"bbbb"})
    other = keep(store, "b" * 64, {"b": b"bbbb"})
    if damage == "missing":
        store.backend.delete(blob_key(manifest["a"].sha256))
    else:
        alter(store.cache, manifest["a"].sha256, b"AA" if damage == "cut" else b"AAAA")
    found = verify_store(store, deep=True, repair=True)
    assert len(found.problems) == 1
    assert found.repairs == [f"artifacts/quantize/{KEY} was removed, for want of a: the next run makes it anew"]
    assert store.manifest("quantize", KEY) is None and store.manifest("quantize", "b" * 64) == other
    assert keep(store, KEY, {"a": b"aaaa", "b": b"bbbb"}) == manifest
    assert verify_store(store, deep=True).problems == []
    assert not list(store.backend.keys("leases"))


def test_a_blob_is_put_back_from_the_local_cache(far: Store, tmp_path: Path) -> None:
    manifest = keep(far, KEY, {"a": b"aaaa"})
    assert isinstance(far.backend, FolderBackend)
    alter(far.backend, manifest["a"].sha256, b"AAAA")
    found = verify_store(far, deep=True, repair=True)
    assert "was put back from" in found.repairs[0] and len(found.repairs) == 1
    assert verify_store(far, deep=True).problems == []
    assert far.cache.size(blob_key(manifest["a"].sha256)) == 4  # the copy is still there


def test_a_copy_that_is_damaged_too_puts_nothing_back_and_goes(far: Store, tmp_path: Path) -> None:
    manifest = keep(far, KEY, {"a": b"aaaa"})
    far.backend.delete(blob_key(manifest["a"].sha256))
    alter(far.cache, manifest["a"].sha256, b"AAAA")
    assert "was removed, for want of a" in verify_store(far, repair=True).repairs[0]
    assert far.cache.size(blob_key(manifest["a"].sha256)) is None


def test_a_blob_of_a_local_store_is_put_back_from_a_checkout_beside_it(store: Store, tmp_path: Path) -> None:
    manifest = keep(store, KEY, {"sub/a": b"aaaa"})
    checkout = store.link_files(manifest, store.cache.root / "checkouts" / manifest.digest)
    store.backend.delete(blob_key(manifest["sub/a"].sha256))
    assert "was put back from" in verify_store(store, repair=True).repairs[0]
    assert verify_store(store, deep=True).problems == [] and (checkout / "sub" / "a").read_bytes() == b"aaaa"


def test_a_manifest_that_cannot_be_read_is_removed(store: Store) -> None:
    store.backend.write(f"artifacts/quantize/{KEY}", b"{")
    found = verify_store(store, repair=True)
    assert len(found.problems) == 1
    assert found.repairs == [
        f"artifacts/quantize/{KEY} was removed, which could not be read: the next run makes it anew"
    ]
    assert verify_store(store).problems == []


@pytest.mark.parametrize("key", ["0" * 64, "f" * 64])
def test_a_manifest_that_gives_a_blob_another_size_costs_no_other_artifact_its_blob(
    store: Store, tmp_path: Path, key: str
) -> None:
    manifest = keep(store, KEY, {"a": b"aaaa"})
    wrong = Manifest.of([replace(manifest["a"], size=5)])
    store.backend.write(f"artifacts/quantize/{key}", wrong.to_json().encode())
    found = verify_store(store, repair=True)
    assert len(found.problems) == 1 and found.problems[0].startswith(f"artifacts/quantize/{key}: a (")
    assert len(found.repairs) == 1 and found.repairs[0].startswith(f"artifacts/quantize/{key} was removed")
    assert store.manifest("quantize", KEY) == manifest and verify_store(store, deep=True).problems == []


def test_names_that_nobody_of_ours_wrote_are_left_alone(store: Store) -> None:
    for path in ("artifacts/stray", "artifacts/quantize/sub/deep", "artifacts/quantize/with space"):
        store.backend.write(path, b"?")
    assert verify_store(store, repair=True).problems == []
    assert len(list(store.backend.keys("artifacts"))) == 3


def test_what_gc_is_deleting_at_the_moment_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    backend = Counted(tmp_path / "store")
    store = Store(backend, cache=backend)
    manifest = keep(store, KEY, {"a": b"aaaa"})
    found: list[StoreCheck] = []
    with lease(store.backend, *GC):
        store.backend.delete(blob_key(manifest["a"].sha256))
        thread = threading.Thread(target=lambda: found.append(verify_store(store)))
        thread.start()
        backend.wait_for_a_look()
        assert found == []
        store.backend.delete(f"artifacts/quantize/{KEY}")
    thread.join(10)
    assert (found[0].checked, found[0].problems) == (1, [])
