"""Garbage collection: what the policy lets go goes, and nothing that anyone relies on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from requant.tasks.artifact import Manifest
from requant.tasks.errors import Collected, StoreError
from requant.tasks.record import StageRecord
from requant.tasks.store import Store
from requant.tasks.store import lease as leases
from requant.tasks.store.catalog import read_catalog
from requant.tasks.store.gc import GRACE_S, CollectionPlan, Policy, collect
from requant.tasks.store.lease import Owner, lease, owner_of
from requant.tasks.store.runs import Run
from requant.tasks.store.store import GC, blob_key
from requant.tasks.store.verify import verify_store
from tests.factories.stores import Counted, ago, keep, put

DAY = 86400.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    return opened(tmp_path)


def opened(folder: Path) -> Store:
    backend = Counted(folder / "store")
    backend.root.mkdir(exist_ok=True)
    return Store(backend, cache=backend)


def looked_at(store: Store) -> None:
    """Wait until another thread has looked at gc's lease."""
    assert isinstance(store.backend, Counted)
    store.backend.wait_for_a_look()


def ran(store: Store, recipe: str, commit: str, *names: str, days: float = 0) -> None:
    run = Run(recipe, f"a/base@{commit}", "b/result", tuple(("quantize", name) for name in names))
    store.backend.write(run.key, run.to_json())
    ago(store.cache.root, days, run.key)


def names(store: Store) -> set[str]:
    return {key for _, key in read_catalog(store).entries}


def gone(plan: CollectionPlan) -> list[str]:
    return [entry.key for entry in plan.artifacts]


def test_without_options_only_old_blobs_go_that_no_artifact_names(store: Store) -> None:
    kept = keep(store, "kept", {"a": b"named"})
    orphan = put(store, {"b": b"orphan"})
    ago(store.cache.root, 2)
    fresh = put(store, {"c": b"fresh: a run is about to name it"})
    plan = collect(store, Policy())
    assert names(store) == {"kept"} and store.sees_blob(kept["a"])
    assert not store.sees_blob(orphan["b"]) and store.sees_blob(fresh["c"])
    assert (len(plan.blobs), plan.remaining_bytes) == (1, 5 + fresh.size)


def test_artifacts_go_by_their_last_use(store: Store) -> None:
    for name in ("old", "reused", "young"):
        keep(store, name, {name: name.encode()})
    ago(store.cache.root, 40)
    store.find("quantize", "reused")
    ago(store.cache.root, 10, "artifacts/quantize/young")
    assert gone(collect(store, Policy(older_than_s=30 * DAY))) == ["old"]
    assert names(store) == {"reused", "young"}
    assert list(store.backend.keys("provenance")) == ["provenance/quantize/reused", "provenance/quantize/young"]
    assert verify_store(store, deep=True).problems == []


def test_nothing_goes_within_the_grace_period_whatever_the_policy_says(store: Store) -> None:
    keep(store, "new", {"a": b"1"})
    ran(store, "recipe", "1", days=9)
    assert gone(collect(store, Policy(keep_last=1, older_than_s=0, max_bytes=0))) == []
    assert names(store) == {"new"}


def test_what_the_last_runs_of_each_recipe_use_stays_and_what_no_run_names(store: Store) -> None:
    for name in ("a1", "a2", "a3", "b1", "shared", "alone"):
        keep(store, name, {name: name.encode()})
    keep(store, "inside", {"i": b"i"}, stage="measure")
    store.backend.write("provenance/quantize/a3", json.dumps({"used": [["measure", "inside"]]}).encode())
    ago(store.cache.root, 40)
    for day, (recipe, commit, *used) in enumerate(
        [("a", "1", "a1"), ("a", "2", "a2", "shared"), ("a", "3", "a3", "shared"), ("b", "1", "b1")]
    ):
        ran(store, recipe, commit, *used, days=30 - day)
    assert sorted(gone(collect(store, Policy(keep_last=2), dry_run=True))) == ["a1"]
    assert sorted(gone(collect(store, Policy(keep_last=1)))) == ["a1", "a2"]
    assert names(store) == {"a3", "b1", "shared", "alone", "inside"}
    assert sorted(store.backend.keys("runs")) == ["runs/a/2", "runs/a/3", "runs/b/1"]  # of a/1 nothing is left


def test_the_longest_unused_go_until_the_rest_fits_and_shared_blobs_count_once(store: Store) -> None:
    for age, name in ((9, "first"), (8, "second"), (7, "third")):
        keep(store, name, {name: name.encode() * 100, "common": b"c" * 1000})
        ago(store.cache.root, age, f"artifacts/quantize/{name}", "blobs")
    plan = collect(store, Policy(max_bytes=2100))
    assert gone(plan) == ["first"]
    assert plan.remaining_bytes == 600 + 500 + 1000
    assert gone(collect(store, Policy(max_bytes=2099))) == ["second"]
    assert verify_store(store).problems == []


def test_several_options_must_agree(store: Store) -> None:
    for name in ("old", "new", "last"):
        keep(store, name, {name: b"1" * 100})
    ago(store.cache.root, 40)
    ran(store, "a", "1", "old", "new", days=39)
    ran(store, "a", "2", "last", days=38)
    ago(store.cache.root, 5, "artifacts/quantize/new")
    assert gone(collect(store, Policy(keep_last=1, older_than_s=30 * DAY), dry_run=True)) == ["old"]
    assert gone(collect(store, Policy(older_than_s=30 * DAY, max_bytes=10**9), dry_run=True)) == []


def test_a_dry_run_says_the_same_and_deletes_nothing(store: Store) -> None:
    keep(store, "old", {"a": b"1"})
    put(store, {"b": b"orphan"})
    ago(store.cache.root, 40)
    before = sorted(p for p in store.cache.root.rglob("*"))
    said = collect(store, Policy(older_than_s=DAY), dry_run=True)
    assert sorted(p for p in store.cache.root.rglob("*")) == before
    assert collect(store, Policy(older_than_s=DAY)) == said and names(store) == set()
    assert not list(store.backend.keys("blobs"))


def test_what_a_lease_needs_stays_until_it_has_been_silent_for_the_grace_period(store: Store) -> None:
    manifest = keep(store, "old", {"a": b"needed"})
    ago(store.cache.root, 40)
    with store.lease("quantize", "other"):
        assert store.has_blob(manifest["a"])
        assert gone(collect(opened(store.cache.root.parent), Policy(older_than_s=DAY))) == []
        assert store.has_blob(manifest["a"])
        (key,) = store.backend.keys("leases")
        ago(store.cache.root, GRACE_S / DAY + 0.1, key)
        assert gone(collect(opened(store.cache.root.parent), Policy(older_than_s=DAY))) == ["old"]


def test_a_blob_that_no_artifact_names_yet_stays_while_a_lease_needs_it(store: Store) -> None:
    manifest = put(store, {"a": b"of an artifact that takes days to make"})
    ago(store.cache.root, 40)
    with store.lease("quantize", "slow"):
        store.need(manifest.files)
        assert collect(opened(store.cache.root.parent), Policy()).blobs == []
        assert store.sees_blob(manifest["a"])
    assert len(collect(opened(store.cache.root.parent), Policy()).blobs) == 1
    assert not store.sees_blob(manifest["a"])


def test_what_a_live_run_uses_stays_between_its_stages(store: Store) -> None:
    keep(store, "base", {"a": b"base"})
    ago(store.cache.root, 40)
    ran(store, "recipe", "1", "base", days=0.9)
    assert gone(collect(store, Policy(older_than_s=DAY, max_bytes=0))) == []
    ago(store.cache.root, 1.1, "runs")
    assert gone(collect(store, Policy(older_than_s=DAY, max_bytes=0))) == ["base"]


def test_whoever_looks_for_a_blob_while_gc_deletes_waits_and_then_sees_that_it_is_gone(store: Store) -> None:
    """The race: gc has read all leases, a run finds an old blob and relies on it, gc deletes it."""
    orphan = put(store, {"a": b"old, and nothing names it"})
    seen: list[bool] = []
    with store.lease("download", "key"):
        with lease(store.backend, *GC):
            thread = threading.Thread(target=lambda: seen.append(store.has_blob(orphan["a"])))
            thread.start()
            looked_at(store)
            assert seen == []
            store.backend.delete(blob_key(orphan["a"].sha256))
        thread.join(10)
    assert seen == [False]


def test_a_reused_artifact_that_gc_was_about_to_delete_is_looked_for_again(store: Store) -> None:
    keep(store, "old", {"a": b"1"})
    found: list[Manifest | None] = []
    with lease(store.backend, *GC):
        thread = threading.Thread(target=lambda: found.append(store.find("quantize", "old")))
        thread.start()
        looked_at(store)
        assert found == []
        store.backend.delete("artifacts/quantize/old")
    thread.join(10)
    assert found == [None]


def test_a_manifest_whose_blobs_were_collected_before_it_was_there_is_not_kept(store: Store) -> None:
    manifest = put(store, {"a": b"1"})
    store.backend.delete(blob_key(manifest["a"].sha256))
    with pytest.raises(Collected, match="run again") as caught:
        store.commit("quantize", "key", manifest, StageRecord())
    assert caught.value.retryable and not list(store.backend.keys("artifacts"))


def test_an_artifact_that_went_just_before_its_use_was_written_is_not_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gc that was over before anyone looked for it."""
    keep(store, "old", {"a": b"1"})
    write = store.backend.write

    def write_late(key: str, data: bytes) -> None:
        store.backend.delete("artifacts/quantize/old")
        write(key, data)

    monkeypatch.setattr(store.backend, "write", write_late)
    assert store.find("quantize", "old") is None


def test_a_manifest_that_gc_took_for_an_old_one_of_its_key_is_written_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that was over before anyone looked for it."""
    manifest = put(store, {"a": b"1"})
    settle = store.wait_for_gc

    def late() -> None:
        store.backend.delete("artifacts/quantize/key")
        settle()

    monkeypatch.setattr(store, "wait_for_gc", late)
    store.commit("quantize", "key", manifest, StageRecord())
    assert store.manifest("quantize", "key") == manifest


def test_a_later_lease_names_what_was_needed_before_it(store: Store) -> None:
    manifest = put(store, {"a": b"1"})
    with store.lease("measure", "one"):
        store.need(manifest.files)
    with store.lease("measure", "two"):
        store.need(manifest.files)
        (key,) = store.backend.keys("leases")
        owner = owner_of(store.backend.read(key) or b"")
        assert owner is not None and list(owner.needs) == [manifest["a"].sha256]


def test_nobody_waits_for_a_gc_that_began_later(store: Store) -> None:
    """Several collect one after the other: who waits for the first is not held up by the others."""
    with lease(store.backend, *GC):
        thread = threading.Thread(target=store.wait_for_gc)
        thread.start()
        looked_at(store)
    with lease(store.backend, *GC):
        thread.join(10)
        assert not thread.is_alive()


def test_a_gc_that_was_killed_holds_nobody_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = keep(store, "a", {"a": b"1"})
    dead = Owner(Owner.this_process().machine, 1 << 22, 0.0, "token")  # above the highest pid there can be
    store.backend.write("/".join(("leases", *GC, "000001")), dead.to_json())
    no_waiting = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: pytest.fail("a dead gc is waited for"))
    monkeypatch.setattr(leases, "time", no_waiting)
    with store.lease("quantize", "b"):
        assert store.has_blob(manifest["a"])
    assert not list(store.backend.keys("leases"))


def test_a_gc_that_was_suspended_deletes_nothing_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(store, "old", {"a": b"1"})
    ago(store.cache.root, 40)
    monkeypatch.setattr(leases, "DEAD_AFTER_S", 0.0)
    with pytest.raises(StoreError, match="not renewed in time"):
        collect(store, Policy(older_than_s=DAY))
    assert names(store) == {"old"}


@pytest.mark.parametrize("deletions", range(6))
def test_killed_after_any_deletion_every_manifest_is_whole_and_the_next_gc_ends_it(
    store: Store, deletions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        keep(store, name, {name: name.encode(), "both": b"both"})
    keep(store, "stays", {"both": b"both"})
    ago(store.cache.root, 40)
    store.find("quantize", "stays")
    delete, left = store.backend.delete, [deletions]

    def dying(key: str, *more: Any) -> None:
        if not key.startswith("leases/"):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        delete(key, *more)

    monkeypatch.setattr(store.backend, "delete", dying)
    with pytest.raises(KeyboardInterrupt):
        collect(store, Policy(older_than_s=DAY))
    monkeypatch.undo()
    assert verify_store(store, deep=True).problems == []
    collect(store, Policy(older_than_s=DAY))
    assert names(store) == {"stays"} and len(list(store.backend.keys("blobs"))) == 1
    assert not [key for key in store.backend.keys("provenance") if "stays" not in key]


def test_a_manifest_that_cannot_be_read_stops_gc(store: Store) -> None:
    put(store, {"a": b"perhaps it names this"})
    store.backend.write("artifacts/quantize/bad", b"{")
    ago(store.cache.root, 40)
    with pytest.raises(StoreError, match="verify --repair"):
        collect(store, Policy())
    assert len(list(store.backend.keys("blobs"))) == 1
