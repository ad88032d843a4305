"""The whole run at 27 B: what is sampled, and the table of measured and planned values."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from infra.bench.whole.base import SMALL, dimensions
from infra.bench.whole.sampler import bytes_below, read_samples, take_sample
from infra.bench.whole.table import MeasuredStage, as_markdown, record_stages
from infra.bench.whole.worker import recipe
from requant.tasks.recipe.loader import parse_recipe


def test_a_file_with_several_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x" * 100_000)
    once = bytes_below(tmp_path)
    (tmp_path / "below").mkdir()
    os.link(tmp_path / "blob", tmp_path / "below" / "name")
    assert bytes_below(tmp_path) == once >= 100_000


def test_samples_are_read_as_they_were_taken_without_a_line_that_was_cut_off(tmp_path: Path) -> None:
    sample = take_sample(os.getpid(), tmp_path)
    assert sample.private_bytes > 0 and sample.cpu_seconds > 0
    lines = tmp_path / "samples.jsonl"
    lines.write_text(json.dumps(asdict(sample)) + "\n" + '{"at": 1')
    assert read_samples(lines) == [sample] and read_samples(tmp_path / "none") == []


def test_a_stage_stands_with_what_was_planned_and_a_dash_for_what_is_not_known() -> None:
    gb = 10**9
    known = MeasuredStage("quantize", 153.84, 247.0, 9 * gb, 8 * gb, 57 * gb, 20 * gb, 21 * gb, 55.4, 9 * gb, 12 * gb)
    unknown = MeasuredStage("publish", 0.3, 0.0, None, None, None, None, None, None, None, None)
    rows = as_markdown([known, unknown]).splitlines()[2:]
    assert rows == [
        "| quantize | 153.8 (247) | 17.00 (57.00) | 8.00 | 20.00 (21.00) | 55 % | 9.00 (12.00) |",
        "| publish | 0.3 (0) | - (-) | - | - (-) |  | - (-) |",
    ]


def test_a_run_takes_the_place_of_an_earlier_one_of_its_size_in_the_recorded_figures(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("[]")
    for seconds, iters in ((100.0, 50), (300.0, 200), (90.0, 50)):
        record_stages(path, 64, iters, [MeasuredStage("quantize", seconds, 247.0, *[None] * 8, compile_seconds=9.0)])
    rows = json.loads(path.read_text())
    assert [(row["iters"], row["seconds"], row["compile_seconds"]) for row in rows] == [
        (200, 300.0, 9.0),
        (50, 90.0, 9.0),
    ]
    assert {row["stage"] for row in rows} == {"quantize"}


def test_the_recipes_of_a_whole_run_and_of_a_small_one_are_recipes() -> None:
    assert parse_recipe(recipe(64, 200)).quantize.nsamples == 128
    assert parse_recipe(recipe(0, 2)).quantize.nsamples == 8
    assert dimensions(8).layers == 8 and dimensions(0) is SMALL
