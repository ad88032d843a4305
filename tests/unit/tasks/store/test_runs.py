"""The record of a run: there while the run goes on, renewed, whole at its end, and never in the run's way."""

from __future__ import annotations

import time

import pytest

from requant.flows.report.report import RunReport
from requant.tasks.artifact import Manifest
from requant.tasks.errors import StoreError
from requant.tasks.hub.revision import Revision
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.record import StageRecord
from requant.tasks.store import Store, runs
from requant.tasks.store.catalog import read_catalog
from requant.tasks.store.runs import Run, recorded
from tests.factories.requant import wait_for

SHA = "c" * 40


@pytest.fixture
def store(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose runs are looked at often."""
    monkeypatch.setattr(runs, "POLL_S", 0.01)
    return store


def a_run(*keys: str) -> Run:
    return Run("0123456789abcdef", f"a/base@{SHA}", "me/result", tuple(("quantize", key) for key in keys))


def read(store: Store) -> Run | None:
    text = store.backend.read(f"runs/0123456789abcdef/{SHA}")
    return None if text is None else Run.from_json(text, 0.0)


def test_a_run_is_recorded_as_soon_as_it_has_used_something_and_whole_at_its_end(store: Store) -> None:
    used: list[str] = []
    with recorded(store, lambda: a_run(*used) if used else None):
        assert read(store) is None
        used.append("a")
        wait_for(lambda: read(store) == a_run("a"))
        used.append("b")
    assert read(store) == a_run("a", "b")


def test_a_run_that_goes_on_is_written_again_so_that_its_age_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "BEAT_S", 0.02)
    with recorded(store, lambda: a_run("a")):
        wait_for(lambda: read(store) is not None)
        (first,) = read_catalog(store).runs
        wait_for(lambda: read_catalog(store).runs[0].seen > first.seen)


def test_a_store_that_fails_does_not_stop_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(key: str, data: bytes) -> None:
        raise StoreError("gone")

    monkeypatch.setattr(store.backend, "write", fail)
    with recorded(store, lambda: a_run("a")):
        time.sleep(0.05)


NO_RUNS = [b"", b"{", b"[]", b'{"recipe": "a", "base": "b", "makes": "c", "artifacts": [1]}', b'{"recipe": 1}']
NO_RUNS += [b"[" * 100_000, b'{"recipe": "../../x", "base": "a@y", "makes": "c", "artifacts": []}']
NO_RUNS += [b'{"recipe": "elsewhere", "base": "a@y", "makes": "c", "artifacts": []}']  # gc would delete it there


@pytest.mark.parametrize("text", NO_RUNS, ids=lambda text: text[:60].decode())
def test_what_is_no_run_is_passed_over(store: Store, text: bytes) -> None:
    store.backend.write("runs/x/y", text)
    assert read_catalog(store).runs == []


def test_a_report_knows_its_run_once_a_stage_is_done() -> None:
    report = RunReport(Recipe.model_validate({"base": {"repo_id": "a/base"}, "publish": {"repo_id": "me/result"}}))
    assert report.run is None
    report.base = Revision("a/base", SHA, (), "model")
    assert report.run is None
    report.stages.append(StageResult("quantize", "key", "ran", 1.0, Manifest.of([]), StageRecord()))
    assert report.run == Run(report.recipe.digest[:16], f"a/base@{SHA}", "me/result", (("quantize", "key"),))
