"""The child's events: written, read again, and told in words."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from requant.tasks.pipeline.prefect import BlockLines
from requant.tasks.quantizing import events
from requant.tasks.quantizing.events import (
    BlockDone,
    BlockLoss,
    BlockOutput,
    BlockStarted,
    CompileFailed,
    Event,
    EventWriter,
    Failed,
    LoopChosen,
    Resumed,
    RoundingKept,
    SettingsChosen,
    StepsTimed,
    Warned,
    line_of,
    read_events,
)

# As version 0.1.0 wrote them, before the events were classes: interrupted runs have such files.
EARLIER: list[tuple[dict[str, Any], Event]] = [
    (
        {
            "event": "settings",
            "seconds": 0.5,
            "device": "cpu",
            "fast": True,
            "low_gpu_mem": False,
            "reasons": {"fast": "x"},
        },
        SettingsChosen(seconds=0.5, device="cpu", fast=True, low_gpu_mem=False, reasons={"fast": "x"}),
    ),
    ({"event": "resumed", "seconds": 1.0, "blocks": 3}, Resumed(seconds=1.0, blocks=3)),
    (
        {"event": "block", "seconds": 1.5, "name": "layers.3", "index": 3, "total": 5},
        BlockStarted(seconds=1.5, name="layers.3", index=3, total=5),
    ),
    (
        {"event": "loop", "seconds": 1.6, "loop": "auto-round", "reason": "the block has hooks"},
        LoopChosen(seconds=1.6, loop="auto-round", reason="the block has hooks"),
    ),
    ({"event": "fallback", "seconds": 1.7, "text": "no compiler"}, CompileFailed(seconds=1.7, text="no compiler")),
    (
        {"event": "kept", "seconds": 1.8, "kept": "last step", "losses": {"last step": 1.0}, "reason": None},
        RoundingKept(seconds=1.8, kept="last step", losses={"last step": 1.0}, reason=None),
    ),
    (
        {"event": "loss", "seconds": 1.9, "before": 0.5, "after": 0.1, "iteration": 7},
        BlockLoss(seconds=1.9, before=0.5, after=0.1, iteration=7),
    ),
    ({"event": "output", "seconds": 2.0, "error": 0.2, "spent": 0.1}, BlockOutput(seconds=2.0, error=0.2, spent=0.1)),
    (
        {"event": "progress", "seconds": 2.1, "done": 4, "total": 5, "peak_gpu_bytes": None},
        BlockDone(seconds=2.1, done=4, total=5, peak_gpu_bytes=None),
    ),
    ({"event": "warning", "seconds": 2.2, "text": "w"}, Warned(seconds=2.2, text="w")),
    ({"event": "error", "seconds": 2.3, "kind": "oom", "text": "t"}, Failed(seconds=2.3, kind="oom", text="t")),
]


@pytest.mark.parametrize(("line", "event"), EARLIER, ids=[line["event"] for line, _ in EARLIER])
def test_a_line_of_an_earlier_version_is_read_and_written_the_same(
    line: dict[str, Any], event: Event, tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert read_events(path) == (path.stat().st_size, [event])
    assert line_of(event) == json.dumps(line)


def test_what_is_written_is_read_with_the_time_of_its_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=itertools.count(100).__next__))
    writer = EventWriter(tmp_path / "events.jsonl")
    for _, event in EARLIER:
        writer.write(event)
    read = read_events(tmp_path / "events.jsonl")[1]
    assert [(type(event), event.details()) for event in read] == [(type(e), e.details()) for _, e in EARLIER]
    assert [event.seconds for event in read] == list(range(1, len(EARLIER) + 1))


def test_a_loss_that_is_no_number_is_written_and_read(tmp_path: Path) -> None:
    EventWriter(tmp_path / "events.jsonl").write(BlockLoss(before=math.nan, after=math.inf))
    (event,) = read_events(tmp_path / "events.jsonl")[1]
    assert isinstance(event, BlockLoss) and math.isnan(event.before) and event.after == math.inf


def test_what_is_no_event_that_is_known_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = ['{"event": "later", "seconds": 1}', '{"event": "block"}', "5", "null", '{"name": "x"}', '{"event": "bl']
    path.write_text("\n".join([*lines, '{"event": "block", "name": "x", "later": 1}']) + "\n")
    assert read_events(path)[1] == [BlockStarted(name="x")]


def test_the_time_left_leaves_out_what_a_new_kind_of_block_took_to_compile() -> None:
    lines = BlockLines()
    told = [
        lines(event)
        for event in (
            BlockStarted(seconds=0.0, name="layers.0"),
            StepsTimed(first=30.5, median=0.5),
            BlockDone(seconds=40.0, done=1, total=3),
            BlockStarted(seconds=40.0, name="layers.1"),
            StepsTimed(first=0.4, median=0.5),
            BlockDone(seconds=52.0, done=2, total=3),
        )
    ]
    assert [line for one in told for line in one] == [
        "block 1 of 3: layers.0, 40.0 s, about 20 s left",
        "block 2 of 3: layers.1, 12.0 s, about 12 s left",
    ]


def test_a_run_is_told_in_words() -> None:
    lines = BlockLines()
    told = [
        lines(event)
        for event in (
            SettingsChosen(),
            BlockDone(seconds=0.5, done=1, total=4),  # auto-round counts finished blocks before it begins the first
            Resumed(blocks=1),
            BlockStarted(seconds=1.0, name="layers.1"),
            CompileFailed(text="no compiler"),
            BlockLoss(before=0.5, after=0.125),
            BlockDone(seconds=3.0, done=2, total=4, peak_gpu_bytes=2_500_000_000),
            BlockStarted(seconds=3.0, name="layers.2"),
            BlockDone(seconds=4.0, done=4, total=4),
        )
    ]
    assert [line for one in told for line in one] == [
        "going on after 1 finished blocks",
        "layers.1: no compiler",
        "block 2 of 4: layers.1, 2.0 s, loss 0.5 to 0.125, about 4 s left, at most 2.5 GB of GPU memory",
        "block 4 of 4: layers.2, 1.0 s",
    ]
