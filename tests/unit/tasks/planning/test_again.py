"""Why a stage runs although the store has an earlier result: the part of its key that changed, and since when."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from requant.flows.report.plan import plan_text
from requant.tasks.artifact import KeyParts, Manifest, StageKey
from requant.tasks.download import download_key
from requant.tasks.hub.revision import Revision
from requant.tasks.mtp_fix import mtp_fix_key
from requant.tasks.pipeline.stage import Made, Stage, put_files, run_stage
from requant.tasks.plan import plan_of
from requant.tasks.planning.again import UNEXPLAINED, why_again
from requant.tasks.planning.inputs import Inputs
from requant.tasks.quantize import STAGE as QUANTIZE
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.record import StageRecord
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import find_text
from requant.tasks.validate import validate_key
from tests.factories.checkpoints import write_files
from tests.factories.pico import pico_base
from tests.factories.stores import held_base, keep, put

pytestmark = pytest.mark.usefixtures("quick_rendering")
CALIBRATION, TEXT = Calibration.of(find_text("builtin:python")), find_text("builtin:python-evaluation")
OTHER = Calibration.of(find_text("builtin:mixed"))
KEY = StageKey.of("quantize", KeyParts(6, {"base": "b", "calibration": "c"}, {"iters": 200}, {"auto-round": "0.16.1"}))


def recipe(**quantize: Any) -> Any:
    small = {"nsamples": 8, "seqlen": 64, "batch_size": 4, "group_size": 32}
    return parse_recipe(
        {
            "base": {"repo_id": "a/b"},
            "quantize": {**small, **quantize},
            "mtp": "drop",
            "benchmark": {"engine": "none"},
        }
    )


@pytest.mark.parametrize(
    ("old", "told"),
    [
        ({"settings": {"iters": 50}}, "iters 50 -> 200"),
        ({"version": 5}, "the stage's version went from 5 to 6"),
        ({"tools": {"auto-round": "0.16.0"}}, "auto-round 0.16.0 -> 0.16.1"),
        ({"reads": {"base": "b", "calibration": "d"}}, "another calibration text"),
        ({"reads": {"base": "old", "calibration": "c"}}, "the base: 2 of 12 files changed since 1234567"),
        ({"reads": {"base": "another base's", "calibration": "c"}}, None),
        ({"reads": {}}, None),
        ({"settings": {"iters": 200, "lr": 0.1}}, "lr 0.1 -> not set"),
        ({"settings": {"iters": 200, "layers": {"lm_head": {"bits": 8}}}}, "layers.lm_head.bits 8 -> not set"),
        ({"settings": {"iters": "9" * 64}}, "another iters"),
        (
            {"settings": dict.fromkeys("abcdefg", 1)},
            "a 1 -> not set, b 1 -> not set, c 1 -> not set, d 1 -> not set, e 1 -> not set, and 3 more",
        ),
    ],
)
def test_each_part_of_a_key_that_changed_is_named(old: dict[str, Any], told: str | None, store: Store) -> None:
    parts = {**vars(KEY.parts), **old}
    keep(store, "1" * 64, {"f": b"x"}, started="2026-11-20T10:00:00+00:00", key_parts=parts)
    before = StageKey.of("quantize", dataclasses.replace(KEY.parts, reads={"base": "old", "calibration": "c"}))
    found = why_again(store, "quantize", KEY, before, "2 of 12 files changed since 1234567")
    assert found == (told and f"{told} (since the result of 2026-11-20)")


def test_the_most_similar_result_counts_and_of_equals_the_newest(store: Store) -> None:
    for number, (date, settings) in enumerate(
        [("2026-11-01", {"iters": 50}), ("2026-11-03", {"iters": 50}), ("2026-11-09", {"iters": 9, "lr": 1})]
    ):
        parts = {**vars(KEY.parts), "settings": settings}
        keep(store, str(number) * 64, {"f": b"x"}, started=f"{date}T10:00:00+00:00", key_parts=parts)
    assert why_again(store, "quantize", KEY, None, "") == "iters 50 -> 200 (since the result of 2026-11-03)"


@pytest.mark.parametrize(
    "damaged", [None, 7, [], {}, {"version": "6"}, {"version": 6, "settings": []}, {"version": 6, "reads": {"base": 1}}]
)
def test_a_damaged_record_gives_no_reason(damaged: object, store: Store) -> None:
    keep(store, "1" * 64, {"f": b"x"}, started="2026-11-20T10:00:00+00:00", key_parts=damaged)
    assert why_again(store, "quantize", KEY, None, "") is None


def test_a_stage_records_what_its_key_covers_and_a_release_does_not_have_it(store: Store) -> None:
    stage = Stage("quantize", 3)
    key = stage.key(reads={"base": "b"}, settings={"iters": 7})

    def work(folder: Path) -> Made:
        files = write_files(folder / "out", {"f": b"x"})
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files))

    record = run_stage(store, stage, key, work).provenance
    assert record.key_parts == key.parts == KeyParts(3, {"base": "b"}, {"iters": 7}, {})
    assert "key_parts" in record.to_json() and "key_parts" not in record.published
    assert StageRecord.from_json(json.dumps(dict(record.to_json()))).key_parts == key.parts


@pytest.fixture
def base(store: Store, tmp_path: Path) -> Revision:
    """A base that was downloaded."""
    return held_base(store, pico_base(tmp_path / "base"))


def downloaded(store: Store, base: Revision) -> Manifest:
    from requant.tasks.artifact import File

    files = Manifest.of(File(f.path, f.size, f.sha256 or "") for f in base.files)
    record = {"started": "2026-11-20T09:00:00+00:00", "base": {"repo_id": base.repo_id, "sha": base.sha}}
    return store.commit("download", download_key(base), files, StageRecord(record))


def quantized(store: Store, base: Manifest, made_with: Any, calibration: Calibration = CALIBRATION) -> StageKey:
    key = quantize_key(made_with, base, calibration)
    record = StageRecord({"started": "2026-11-20T10:00:00+00:00"}).with_key_parts(key.parts)
    store.commit("quantize", key, put(store, {"quantized": str(key).encode()}), record)
    return key


def again(store: Store, base: Revision, asked: Any) -> dict[str, str | None]:
    document = plan_of(store, asked, Inputs(base, CALIBRATION, TEXT), elsewhere=True)
    assert document.stages, document.problems
    told = [line for line in plan_text(document).splitlines() if line.startswith("again ")]
    assert len(told) == sum(stage.again is not None for stage in document.stages)
    return {stage.name: stage.again for stage in document.stages if stage.again is not None}


def test_a_plan_says_why_quantize_runs_again_and_nothing_of_a_stage_that_never_ran(
    store: Store, base: Revision
) -> None:
    files = downloaded(store, base)
    assert again(store, base, recipe()) == {}
    quantized(store, files, recipe())
    assert again(store, base, recipe()) == {}, "it is reused"
    since = "(since the result of 2026-11-20)"
    assert again(store, base, recipe(iters=50)) == {"quantize": f"iters 200 -> 50 {since}"}
    assert again(store, base, recipe(scheme="W8A16")) == {"quantize": f"scheme W4A16 -> W8A16 {since}"}


def test_a_new_version_of_a_stage_and_of_a_tool_are_reasons(
    store: Store, base: Revision, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = downloaded(store, base)
    with monkeypatch.context() as then:
        then.setattr("requant.tasks.quantize.STAGE", dataclasses.replace(QUANTIZE, version=QUANTIZE.version - 1))
        then.setattr("requant.tasks.pipeline.stage.locked_version", lambda name: "0.1")
        quantized(store, files, recipe())
    (reason,) = again(store, base, recipe()).values()
    assert reason is not None and f"version went from {QUANTIZE.version - 1} to {QUANTIZE.version}" in reason
    assert "auto-round 0.1 -> " in reason and "transformers 0.1 -> " in reason


def test_another_commit_of_the_base_is_told_by_how_many_files_changed(
    store: Store, base: Revision, tmp_path: Path
) -> None:
    quantized(store, downloaded(store, base), recipe())
    folder = pico_base(tmp_path / "again", seed=7)
    newer = dataclasses.replace(held_base(store, folder), sha="1" * 40)
    (reason,) = again(store, newer, recipe()).values()
    assert reason is not None and f"of {len(newer.wanted)} files changed since 0000000" in reason


def test_results_of_an_older_requant_are_said_to_have_no_reasons(store: Store, base: Revision) -> None:
    keep(store, "1" * 64, {"f": b"x"}, started="2026-11-20T10:00:00+00:00", seconds=3.0)
    assert again(store, base, recipe()) == {}, "nothing says that it was made of this base"
    downloaded(store, base)
    assert again(store, base, recipe()) == {"quantize": UNEXPLAINED}


def test_a_later_stage_is_told_of_the_same_artifact(store: Store, base: Revision) -> None:
    files = downloaded(store, base)
    key = quantized(store, files, recipe())
    quantized_files = store.manifest("quantize", key)
    assert quantized_files is not None
    fixed = put(store, {"fixed": b"x"})
    store.commit("mtp_fix", mtp_fix_key(recipe(), files, quantized_files), fixed, StageRecord({}))
    measured = validate_key(recipe(), files, fixed, find_text("builtin:mixed-evaluation"))
    record = StageRecord({"started": "2026-11-21T10:00:00+00:00"}).with_key_parts(measured.parts)
    store.commit("validate", measured, put(store, {"v": b"x"}), record)
    assert again(store, base, recipe()) == {"validate": "another text to measure on (since the result of 2026-11-21)"}
