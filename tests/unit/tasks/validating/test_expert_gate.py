"""The gate of experts that no token of the calibration reached."""

from __future__ import annotations

from requant.tasks.recipe.recipe import Gates
from requant.tasks.validating.expert_gate import EXPERT_GATE, judge_experts

ALL = {"layers.0.mlp.experts": [5, 3], "layers.1.mlp.experts": [1, 7]}
SOME = {"layers.0.mlp.experts": [0, 8], "layers.1.mlp.experts": [0, 0, 0, 0, 0, 8]}


def test_a_model_without_experts_has_no_such_gate() -> None:
    assert judge_experts({}, Gates(max_experts_without_tokens=0)) == []


def test_where_all_were_reached_it_passes_with_or_without_a_limit() -> None:
    (gate,) = judge_experts(ALL, Gates(max_experts_without_tokens=0))
    assert (gate.name, gate.value, gate.limit, gate.passed, gate.note) == (EXPERT_GATE, 0.0, 0.0, True, "")
    (gate,) = judge_experts(ALL, Gates())
    assert (gate.limit, gate.result) == (None, "measured")


def test_those_that_were_not_reached_are_named_and_a_remedy_is_told() -> None:
    (gate,) = judge_experts(SOME, Gates(max_experts_without_tokens=5))
    assert gate.failed and gate.value == 6.0
    assert gate.note.startswith("layers.0.mlp.experts.0, layers.1.mlp.experts.0, layers.1.mlp.experts.1, ")
    assert "experts.3 and 1 more; more samples, or calibration: self, reach" in gate.note
    assert judge_experts(SOME, Gates(max_experts_without_tokens=6))[0].passed
    (gate,) = judge_experts(SOME, Gates())
    assert gate.passed and gate.note.startswith("no limit asked for; layers.0.mlp.experts.0, ")
