"""The gate of the draft acceptance in an engine, in runs whose engine is the stand-in.

In torch, the finished run's result has about 0.64 of its base's draft acceptance, which passes all limits here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.factories.paths import ROOT
from tests.factories.requant import Outcome, Requant

ENGINE = ROOT / "tests" / "factories" / "stand_in_engine.py"
GATE = "engine_acceptance_ratio"
BENCHMARK = {"engine": "vllm", "prompts": ["prose"], "max_tokens": 4, "concurrency": 1, "acceptance_precision": 0.2}
Finished = tuple[Requant, Outcome]


def with_engine(requant: Requant, base: float | str, quantized: float) -> Requant:
    """The same with the stand-in as its vLLM, which accepts these shares of drafts."""
    pids = requant.folder / "pids"
    pids.mkdir(exist_ok=True)
    accepts = json.dumps({"base": base, "quantized": quantized})
    return requant.variant(REQUANT_VLLM=f"{sys.executable} {ENGINE}", ENGINE_PIDS=str(pids), ENGINE_ACCEPTS=accepts)


def run(requant: Requant, limit: float | None, **gates: Any) -> Outcome:
    return requant.run(benchmark=BENCHMARK, gates={"min_mtp_acceptance_ratio": limit, **gates}, publish=None)


def gate_of(outcome: Outcome) -> dict[str, Any]:
    return next(gate for gate in outcome.document["gates"] if gate["name"] == GATE)


@pytest.fixture(scope="module")
def worse(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The finished run with an engine that accepts fewer drafts of the result, which the limit allows."""
    requant = with_engine(finished[0].copy(tmp_path_factory.mktemp("worse")), base=0.9, quantized=0.3)
    return requant, run(requant, 0.2)


def test_drafts_within_the_limit_pass_and_the_gate_has_the_interval(worse: Finished) -> None:
    _, outcome = worse
    assert outcome.status == 0, outcome.stderr
    document, gate = outcome.document, gate_of(outcome)
    assert document["status"] == "validated" and gate["passed"] and gate["limit"] == 0.2
    low, high = gate["interval"]
    assert 0.2 < low < gate["value"] < high < 0.4 and gate["value"] == pytest.approx(1 / 3, abs=0.05)
    assert outcome.states["acceptance"] == "ran" and list(outcome.states)[-2:] == ["benchmark", "acceptance"]
    drafts = document["drafts"]
    assert sum(drafts["base"]["drafted"]) == sum(drafts["quantized"]["drafted"]) == 10 * 32 * 8
    assert drafts["base"]["version"] == "vLLM 0.0.1" and drafts["text"] == document["measured"]["text"]


def test_the_server_of_the_benchmark_counts_the_result_so_that_the_base_alone_takes_one_more(worse: Finished) -> None:
    servers_and_workers = [path for path in Path(worse[0].folder, "pids").iterdir() if path.name.isdecimal()]
    assert len(servers_and_workers) == 2 * 3  # MTP off, MTP on, the base


def test_drafts_below_the_limit_reject_the_run_without_counting_again(worse: Finished) -> None:
    requant, before = worse
    outcome = run(requant, 0.4)
    assert outcome.status == 1 and outcome.document["status"] == "rejected"
    assert set(outcome.states.values()) == {"reused"} and outcome.document["published"] is None
    gate = gate_of(outcome)
    assert gate["passed"] is False and gate["value"] == gate_of(before)["value"]
    assert f"{GATE} failed" in outcome.stderr


def test_a_base_that_does_not_start_leaves_the_gate_unmeasured_and_the_run_goes_on(
    worse: Finished,
) -> None:
    requant, _ = worse
    requant.forget("acceptance", "drafts")
    dying = with_engine(requant, base="ValueError: No available memory for the cache blocks.", quantized=0.9)
    outcome = run(dying, 0.2)
    assert outcome.status == 0, outcome.stderr
    gate = gate_of(outcome)
    assert gate["value"] is None and gate["passed"] is None
    assert "ValueError: No available memory for the cache blocks." in gate["note"]
