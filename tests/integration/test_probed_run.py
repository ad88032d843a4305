"""Runs with probes, whose engine is a stand-in that answers well, and with damage only where it is told so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.factories.paths import ROOT
from tests.factories.requant import Outcome, Requant

ENGINE = ROOT / "tests" / "factories" / "stand_in_engine.py"
RECIPE: dict[str, Any] = {
    "benchmark": {
        "engine": "vllm", "prompts": ["prose"], "max_tokens": 4, "concurrency": 1, "acceptance_precision": 0.2,
    },
    "gates": {"min_mtp_acceptance_ratio": None},
    "probes": {"sets": ["tools", "answers"], "limit": 20, "max_tokens": 256},
    "publish": None,
}  # fmt: skip
Finished = tuple[Requant, Outcome]


def engine_of(requant: Requant, damage: str) -> Requant:
    """The same with the stand-in as its vLLM."""
    pids = requant.folder / "pids"
    pids.mkdir(exist_ok=True)
    command = f"{sys.executable} {ENGINE}"
    return requant.variant(REQUANT_VLLM=command, ENGINE_PIDS=str(pids), ENGINE_DAMAGE=damage)


@pytest.fixture(scope="module")
def looping(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The finished run, whose result loops in the engine as its base does not."""
    requant = engine_of(finished[0].copy(tmp_path_factory.mktemp("looping")), "answers")
    return requant, requant.run(**RECIPE)


def test_a_result_that_loops_as_its_base_does_not_is_rejected(looping: Finished) -> None:
    _, outcome = looping
    assert outcome.status == 1 and outcome.document["status"] == "rejected"
    failed = {gate["name"] for gate in outcome.document["gates"] if gate["passed"] is False}
    assert failed == {"answers_finished", "answers_without_loop"}
    assert "answers_finished, answers_without_loop failed" in outcome.stderr
    assert outcome.states["probe"] == "ran" and outcome.document["published"] is None
    (reason,) = outcome.document["probes"]["reasons"]
    assert reason == {"set": "answers", "reason": "loop", "base": 0, "ours": 20}


def test_without_a_limit_nothing_is_asked_again_and_card_and_report_have_the_probes(looping: Finished) -> None:
    requant, _ = looping
    out = requant.folder / "out"
    outcome = requant.run("--checkout", str(out), **{**RECIPE, "gates": {**RECIPE["gates"], "max_probe_loss": None}})
    assert outcome.status == 0, outcome.stderr
    assert outcome.states["probe"] == "reused" and outcome.document["status"] == "validated"
    for file in ("README.md", "report.md"):
        text = Path(out, file).read_text()
        assert "| answers that end | 20 | 100.0% | 0.0% | 100.0% |" in text, file
        assert "| `loop` | `answers` | 0 | 20 |" in text, file


def test_a_base_that_cannot_be_served_leaves_its_probes_unmeasured_and_the_run_goes_on(looping: Finished) -> None:
    requant, _ = looping
    requant.forget("probe", "probe_answers")
    outcome = engine_of(requant, "start").run(**RECIPE)
    assert outcome.status == 0, outcome.stderr
    gates = {gate["name"]: gate for gate in outcome.document["gates"]}
    for name in ("tool_calls_valid", "tool_calls_right", "answers_finished", "answers_without_loop"):
        assert gates[name]["value"] is None and gates[name]["passed"] is None
        assert "CUDA out of memory" in gates[name]["note"]
        assert str(requant.folder) not in gates[name]["note"]  # gates are published
    assert outcome.document["probes"] is None and "probe" not in outcome.states


def test_a_plan_has_the_stage_and_what_it_needs(looping: Finished) -> None:
    requant, _ = looping
    plan = requant("plan", str(requant.write_recipe(**RECIPE)), "--json").document
    stage = next(stage for stage in plan["stages"] if stage["name"] == "probe")
    assert stage["bytes"] > 0 and stage["figure"]
