"""Artifacts move between stores whole, checked, and with what is recorded beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.errors import CorruptBlob, RequantError, StoreError
from requant.tasks.record import StageRecord
from requant.tasks.store import Store
from requant.tasks.store.catalog import read_catalog
from requant.tasks.store.copy import copy, find_entries, store_at
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.store import blob_key
from requant.tasks.store.verify import verify_store
from tests.factories.stores import keep

KEYS = ("a" * 64, "b" * 64, "c" * 64)


def opened(folder: Path) -> Store:
    backend = FolderBackend(folder)
    backend.check()
    return Store(backend, cache=backend)


@pytest.fixture
def source(tmp_path: Path) -> Store:
    return opened(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return opened(tmp_path / "target")


def test_an_artifact_is_the_same_in_the_other_store_and_stays_in_the_first(
    source: Store, target: Store, tmp_path: Path
) -> None:
    manifest = keep(source, KEYS[0], {"a": b"1", "sub/b": b"22"}, seconds=7)
    (copied,) = copy(source, target, read_catalog(source).entries.values())
    assert copied.bytes == 3
    assert target.manifest("quantize", KEYS[0]) == manifest == source.manifest("quantize", KEYS[0])
    assert target.provenance("quantize", KEYS[0]) == StageRecord({"seconds": 7, "copied_from": source.url})
    assert verify_store(target, deep=True).problems == [] == verify_store(source, deep=True).problems
    assert not list(source.backend.keys("leases")) + list(target.backend.keys("leases"))


def test_only_what_is_missing_moves(source: Store, target: Store, tmp_path: Path) -> None:
    keep(source, KEYS[0], {"a": b"1", "b": b"22"})
    keep(target, KEYS[1], {"a": b"1"})
    entries = read_catalog(source).entries.values()
    assert [c.bytes for c in copy(source, target, entries)] == [2]
    assert [c.bytes for c in copy(source, target, entries)] == [0]


def test_a_copy_that_was_cut_off_goes_on_and_shows_nothing_before(
    source: Store, target: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(source, KEYS[0], {"a": b"1", "b": b"22", "c": b"333"})
    put, left = target.cache.put_file, [2]

    def dying(key: str, path: Path, *more: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        put(key, path, *more)

    monkeypatch.setattr(target.cache, "put_file", dying)
    with pytest.raises(KeyboardInterrupt):
        copy(source, target, read_catalog(source).entries.values())
    monkeypatch.undo()
    assert not list(target.backend.keys("artifacts"))
    (again,) = copy(source, target, read_catalog(source).entries.values())
    assert 0 < again.bytes < 6 and verify_store(target, deep=True).problems == []


def test_another_artifact_for_a_stage_key_stays_and_is_named_and_the_others_arrive(
    source: Store, target: Store, tmp_path: Path
) -> None:
    keep(source, KEYS[0], {"a": b"source's"})
    second = keep(source, KEYS[1], {"b": b"2"})
    first = keep(target, KEYS[0], {"a": b"target's"})
    with pytest.raises(
        RequantError, match=rf"has another artifact for quantize/{KEYS[0][:12]} \({first.digest[:12]}, not"
    ):
        copy(source, target, read_catalog(source).entries.values())
    assert target.manifest("quantize", KEYS[0]) == first and target.manifest("quantize", KEYS[1]) == second
    assert len(list(target.backend.keys("blobs"))) == 2  # nothing moved in vain


def test_a_damaged_blob_is_refused_and_no_artifact_arrives(source: Store, target: Store, tmp_path: Path) -> None:
    manifest = keep(source, KEYS[0], {"a": b"right"})
    path = source.cache.path(blob_key(manifest["a"].sha256))
    path.chmod(0o644)
    path.write_bytes(b"wrong")
    with pytest.raises(CorruptBlob, match="does not have the sha256"):
        copy(source, target, read_catalog(source).entries.values())
    assert not list(target.backend.keys("artifacts")) + list(target.backend.keys("blobs"))
    assert not list((target.cache.root / "arriving").iterdir())


def test_a_blob_that_the_source_lost_is_named(source: Store, target: Store, tmp_path: Path) -> None:
    manifest = keep(source, KEYS[0], {"a": b"right"})
    source.backend.delete(blob_key(manifest["a"].sha256))
    with pytest.raises(StoreError, match="has lost a "):
        copy(source, target, read_catalog(source).entries.values())


def test_an_artifact_is_found_by_the_beginning_of_its_key_or_digest(source: Store, tmp_path: Path) -> None:
    manifest = keep(source, KEYS[0], {"a": b"1"})
    keep(source, KEYS[1], {"a": b"1"})
    keep(source, KEYS[2], {"a": b"2"})
    catalog = read_catalog(source)
    assert [entry.key for entry in find_entries(catalog, "aaaa")] == [KEYS[0]]
    assert [entry.key for entry in find_entries(catalog, manifest.digest[:12])] == [KEYS[0], KEYS[1]]
    for name, count in (("nothing", 0), ("", 2)):
        with pytest.raises(RequantError, match=f"^{count} artifacts have"):
            find_entries(catalog, name)


def test_a_place_is_a_store_address_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_at("s3://bucket/prefix") == "s3://bucket/prefix"
    assert store_at("stick") == (tmp_path / "stick").as_uri() == store_at(str(tmp_path / "stick"))
