"""A benchmark for a person at a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from requant.flows.report.terminal import bench_text
from requant.tasks.serving.result import BenchmarkResult
from tests.factories.paths import ROOT

RECORDED = json.loads(Path(ROOT, "tests", "unit", "tasks", "serving", "benchmarks.json").read_text())


def text_of(engine: str) -> str:
    return bench_text(BenchmarkResult.from_json(json.dumps(RECORDED[engine])), "my-model")


@pytest.mark.parametrize("engine", ["vllm", "torch", "url"])
def test_every_prompt_is_a_row_below_the_speed(engine: str) -> None:
    document, (_, first, *lines) = RECORDED[engine], text_of(engine).splitlines()
    assert first.startswith(f"my-model  {document['tokens_per_second']:.1f} tokens/s")
    assert len([line for line in lines if " ms " in line]) == len(document["prompts"])
    assert [line for line in lines if line.startswith("log ")] == [f"log       {path}" for path in document["logs"]]


def test_an_engine_that_drafts_is_shown_with_mtp_and_without() -> None:
    lines = text_of("vllm").splitlines()
    mtp = RECORDED["vllm"]["mtp"]
    assert f"draft acceptance rate {mtp['on']['acceptance']:.1%}, {mtp['speedup']:.2f} times as fast" in lines[1]
    for word, mode in (("MTP off", "off"), ("MTP on", "on")):
        (line,) = (line for line in lines if line.startswith(word))
        assert f"{mtp[mode]['tokens_per_second']:.1f} tokens/s, greedy, one request at a time" in line


def test_no_engine_is_a_line_that_says_so() -> None:
    assert text_of("none") == "\nmy-model  not measured (none)\n"
