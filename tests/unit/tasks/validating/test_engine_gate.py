"""The gate of the draft acceptance rate in an engine: passed, failed, not judged, required."""

from __future__ import annotations

import json
from typing import Any

import pytest

from requant.tasks.recipe.recipe import Gates
from requant.tasks.validating.document import ValidationDocument
from requant.tasks.validating.drafts import DraftComparison, DraftCount
from requant.tasks.validating.engine_gate import ENGINE_GATE, EngineDrafts, judge_engine
from requant.tasks.validating.gates import Gate, accepted, judge, summary
from tests.factories.measured import good

NOT_IN_TORCH: dict[str, Any] = {"mtp_acceptance_ratio": None, "mtp_acceptance": None, "base_mtp_acceptance": None}
REQUIRED = Gates(mtp_acceptance="required")


def count(share: float, spread: int = 6, batches: int = 20) -> DraftCount:
    """Batches of 280 drafted tokens, of which this share is accepted, with some scatter."""
    accepted_tokens = [round(280 * share) + spread * (-1) ** number for number in range(batches)]
    return DraftCount(drafted=(280,) * batches, accepted=tuple(accepted_tokens))


def compared(share: float, base: float = 0.9, spread: int = 6) -> EngineDrafts:
    """A comparison whose batches scatter in opposite directions, so that the interval has a width."""
    return EngineDrafts(DraftComparison(text="t", quantized=count(share, spread), base=count(base, -spread)))


def gate(drafts: EngineDrafts | None, limits: Gates | None = None, **changes: Any) -> Gate:
    (found,) = judge_engine(good(**changes), limits or Gates(), drafts)
    return found


def test_a_ratio_passes_if_its_whole_interval_does_and_fails_if_none_of_it_does() -> None:
    passed, failed = gate(compared(0.895)), gate(compared(0.82))
    assert passed.name == failed.name == ENGINE_GATE
    assert passed.passed is True and passed.interval is not None and passed.interval[0] >= 0.95
    assert failed.passed is False and failed.interval is not None and failed.interval[1] < 0.95
    assert passed.value == pytest.approx(0.895 / 0.9, abs=0.005)
    low, high = passed.interval
    assert passed.note == f"between {low:.3f} and {high:.3f}: 89.6% of 5,600 drafted tokens, the base's 90.0% of 5,600"


def test_a_limit_inside_the_interval_is_not_judged_and_says_what_would_tell() -> None:
    undecided = gate(compared(0.862))
    assert undecided.passed is None and not undecided.failed and undecided.value is not None
    assert undecided.interval is not None and undecided.interval[0] < 0.95 <= undecided.interval[1]
    assert "more drafted tokens would tell: lower benchmark.acceptance_precision" in undecided.note
    assert undecided.result == "cannot tell"
    assert summary([*judge(good(), Gates()), undecided]) == "17 passed, 1 cannot tell"


def test_a_ratio_of_0_that_cannot_be_judged_is_not_said_to_be_the_limit() -> None:
    none = DraftCount(drafted=(1,) * 10, accepted=(0,) * 10)
    drafts = EngineDrafts(DraftComparison(text="t", quantized=none, base=count(0.3)))
    undecided = gate(drafts)
    assert undecided.value == 0 and undecided.passed is None
    assert undecided.note.endswith("too few drafts were made or accepted to tell")


def test_drafts_that_are_not_compared_are_not_judged_and_the_reason_is_told() -> None:
    unmeasured = gate(EngineDrafts(why_not="vLLM did not start: no memory"))
    assert (unmeasured.value, unmeasured.passed, unmeasured.result) == (None, None, "not measured")
    assert unmeasured.note == "vLLM did not start: no memory"


def test_a_ratio_to_a_base_whose_drafts_are_never_accepted_is_undefined() -> None:
    undefined = gate(compared(0.5, base=0.0, spread=0))
    assert undefined.passed is None and undefined.note == "is undefined, since none of the base's drafts is accepted"


NOTHING = DraftCount(drafted=(0,) * 10, accepted=(0,) * 10)


def test_an_engine_that_counts_no_drafts_of_the_base_tells_nothing() -> None:
    silent = gate(EngineDrafts(DraftComparison(text="t", quantized=NOTHING, base=NOTHING)))
    assert (silent.value, silent.passed, silent.note) == (None, None, "the engine counted no drafts of the base")


def test_tokens_beyond_what_is_counted_are_not_recommended() -> None:
    near = gate(compared(0.8568))
    assert near.passed is None and near.note.endswith(
        " more drafted tokens would tell, and at most 100,000 are counted"
    )


def test_a_result_that_drafts_nothing_in_the_engine_fails() -> None:
    silent = gate(EngineDrafts(DraftComparison(text="t", quantized=NOTHING, base=count(0.9))))
    assert silent.passed is False and silent.value == 0.0 and "it drafted nothing, the base 5,600 tokens" in silent.note


def test_a_limit_of_null_reports_the_ratio_and_compares_nothing() -> None:
    free = gate(compared(0.3), Gates(min_mtp_acceptance_ratio=None))
    assert free.passed is True and free.limit is None and free.note.startswith("no limit asked for; ")


def test_without_an_engine_there_is_no_gate() -> None:
    assert judge_engine(good(), Gates(), None) == []
    assert judge_engine(good(), REQUIRED, None) == [], "torch has measured it"


# Acceptance that neither torch nor an engine can tell.


def test_a_head_that_torch_cannot_run_does_not_block_and_the_gate_says_so() -> None:
    gates = judge(good(**NOT_IN_TORCH), Gates())
    (torch,) = [each for each in gates if each.name == "mtp_acceptance_ratio"]
    assert (torch.value, torch.passed, torch.limit) == (None, None, 0.95) and "in torch" in torch.note
    assert accepted(gates) and ValidationDocument.of(good(**NOT_IN_TORCH), Gates()).passed


def test_a_head_that_only_the_base_has_still_fails() -> None:
    missing = good(mtp_acceptance_ratio=None, mtp_acceptance=None, base_mtp_acceptance=0.9)
    assert not accepted(judge(missing, Gates()))


def test_a_checkpoint_that_could_not_be_run_at_all_still_fails() -> None:
    not_run = good(**NOT_IN_TORCH, same_tokens=None, top1_agreement=None, not_measured="it cannot be run")
    (torch,) = [each for each in judge(not_run, Gates()) if each.name == "mtp_acceptance_ratio"]
    assert torch.failed


@pytest.mark.parametrize(
    "drafts", [None, EngineDrafts(why_not="vLLM did not start"), compared(0.862)], ids=["none", "failed", "undecided"]
)
def test_required_fails_where_neither_torch_nor_an_engine_tells(drafts: EngineDrafts | None) -> None:
    assert gate(drafts, REQUIRED, **NOT_IN_TORCH).failed


@pytest.mark.parametrize("drafts", [EngineDrafts(why_not="vLLM did not start"), compared(0.862)])
def test_required_passes_where_torch_tells_or_an_engine_does(drafts: EngineDrafts) -> None:
    assert gate(drafts, REQUIRED).passed is None
    assert gate(compared(0.895), REQUIRED, **NOT_IN_TORCH).passed is True
    assert judge_engine(good(head_kept=False, **NOT_IN_TORCH), REQUIRED, None) == []


def test_required_fails_in_requant_validate_which_has_no_engine() -> None:
    document = ValidationDocument.of(good(**NOT_IN_TORCH), REQUIRED)
    assert not document.passed and document.gates[-1].name == ENGINE_GATE
    assert "set benchmark.engine to vllm" in document.gates[-1].note


def test_the_interval_is_in_json_where_there_is_one_and_absent_otherwise() -> None:
    passed, unmeasured = gate(compared(0.895)), gate(EngineDrafts(why_not="x"))
    assert passed.interval is not None and "interval" not in unmeasured.to_json()
    assert json.loads(json.dumps(passed.to_json()))["interval"] == list(passed.interval)
    document = ValidationDocument(gates=(passed, unmeasured), passed=True, findings=()).to_json()
    assert document["gates"][0]["interval"] == list(passed.interval) and "interval" not in document["gates"][1]
