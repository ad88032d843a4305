"""Gates: limits, what cannot be measured, and what is not a number."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from requant.tasks.recipe.recipe import MAX_KL_DIVERGENCE, Gates
from requant.tasks.validating.gates import (
    FIXED,
    MAX_REPEATED_SHARE,
    QUALITY_GATES,
    Gate,
    judge,
    most_repeated,
    slope_error,
    summary,
)
from requant.tasks.validating.measured import MatrixError
from requant.tasks.validating.paired import compare_pairs
from tests.factories.measured import GOOD, good


def matrix(**changes: Any) -> list[dict[str, Any]]:
    """The good matrices, the last one changed."""
    return [GOOD["matrices"][0], {**GOOD["matrices"][1], **changes}]


def block(error: float) -> list[dict[str, Any]]:
    return [GOOD["blocks"][0], {**GOOD["blocks"][1], "error": error}]


def slope_of(**figures: float) -> float:
    """Judge the slope of a matrix with these figures."""
    return slope_error(MatrixError.model_validate({"name": "a.weight", "bits": 4, "offset": 0.0, **figures}))


def by_name(gates: list[Gate]) -> dict[str, Gate]:
    return {gate.name: gate for gate in gates}


def failed(limits: Gates | None = None, **changes: Any) -> set[str]:
    return {gate.name for gate in judge(good(**changes), limits or Gates()) if gate.failed}


def test_a_good_checkpoint_passes_every_gate() -> None:
    assert failed() == set()
    assert set(by_name(judge(good(), Gates()))) == {
        "structure", "lossless", "finite", "files", "context", "weight_slope", "weight_offset", "same_tokens",
        "block_error", "perplexity_increase", "kl_divergence", "top1_agreement", "most_repeated_token", "long_context",
        "vision_output", "mtp_acceptance_ratio", "speculative_decoding",
    }  # fmt: skip


FAILURES: dict[str, tuple[str, Any]] = {
    "structure": ("unaccounted", ["a is missing"]),
    "lossless": ("altered", ["a differs from the base's"]),
    "finite": ("not_finite", ["a"]),
    "files": ("files", ["tokenizer.json differs from the base's"]),
    "context": ("context", ["config.json says rope_theta 1"]),
    "weight_slope": ("matrices", matrix(scale_factor=0.95)),
    "weight_offset": ("matrices", matrix(offset=-0.3)),
    "block_error": ("blocks", block(0.51)),
    "same_tokens": ("same_tokens", 0.999),
    "perplexity_increase": ("perplexity_increase", 0.0501),
    "top1_agreement": ("top1_agreement", 0.8499),
    "most_repeated_token": ("most_repeated_token", 0.91),
    "long_context": ("long_context", 0.99),
    "vision_output": ("vision_difference", 1e-6),
    "mtp_acceptance_ratio": ("mtp_acceptance_ratio", 0.9499),
    "speculative_decoding": ("speculative_agreement", 0.99),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_gate_fails_alone_and_by_its_own_value(name: str) -> None:
    key, value = FAILURES[name]
    assert failed(**{key: value}) == {name}


def test_a_value_at_its_limit_passes() -> None:
    at = {"perplexity_increase": 0.05, "top1_agreement": 0.85, "mtp_acceptance_ratio": 0.95}
    assert failed(most_repeated_token=MAX_REPEATED_SHARE, **at) == set()


# A value that fails by itself, the base's value with which it passes, and one that is worse than that.
FLAWS_OF_THE_BASE = {
    "most_repeated_token": ("most_repeated_token", 1.0, 0.97, None),
    "long_context": ("long_context", 0.7, 0.7, 0.69),
    "speculative_decoding": ("speculative_agreement", 0.98, 0.98, 0.97),
}


@pytest.mark.parametrize("name", FLAWS_OF_THE_BASE)
def test_what_the_base_does_too_fails_no_result(name: str) -> None:
    """Every gate with a limit of its own, instead of a comparison, is here."""
    key, value, of_base, worse = FLAWS_OF_THE_BASE[name]
    assert failed(**{key: value}) == {name}, "a document of an earlier version has no value of the base"
    gate = by_name(judge(good(**{key: value, f"base_{key}": of_base}), Gates()))[name]
    assert gate.passed and gate.note == f"the base's own is {of_base}"
    if worse is not None:
        assert failed(**{key: worse, f"base_{key}": of_base}) == {name}


def test_no_fixed_limit_is_left_that_a_base_may_fail_itself() -> None:
    """The others compare with the base: its tokens, its vision features."""
    assert {"same_tokens", "vision_output"} == FIXED - FLAWS_OF_THE_BASE.keys()


@pytest.mark.parametrize(("of_base", "limit"), [(0.1, 0.9), (0.8, 0.9), (0.84, 0.94), (1.0, 1.0)])
def test_garbage_is_told_from_a_base_that_repeats_itself(of_base: float, limit: float) -> None:
    gate = by_name(judge(good(most_repeated_token=0.95, base_most_repeated_token=of_base), Gates()))
    assert gate["most_repeated_token"].limit == pytest.approx(limit)
    assert gate["most_repeated_token"].failed == (limit < 0.95)


@pytest.mark.parametrize("key", ["base_most_repeated_token", "base_long_context", "base_speculative_agreement"])
def test_a_sound_base_excuses_nothing(key: str) -> None:
    sound = 0.1 if "repeated" in key else 1.0
    for name, (own, value, *_) in FLAWS_OF_THE_BASE.items():
        if key == f"base_{own}":
            assert failed(**{own: value, key: sound}) == {name}


def test_a_tensor_that_is_not_finite_in_the_base_either_is_shown_and_fails_nothing() -> None:
    gate = by_name(judge(good(not_finite_in_base=["a is not finite in the base either"]), Gates()))["finite"]
    assert gate == Gate("finite", 0.0, 0.0, True, "a is not finite in the base either")


UNMEASURED = {
    "weight_slope": "matrices", "weight_offset": "matrices", "block_error": "blocks", "vision_output":
    "vision_difference", **{name: name for name in ("same_tokens", "perplexity_increase", "kl_divergence",
    "top1_agreement", "most_repeated_token", "long_context")},
}  # fmt: skip


@pytest.mark.parametrize("name", UNMEASURED)
def test_a_value_that_could_not_be_measured_does_not_pass(name: str) -> None:
    gate = by_name(judge(good(**{UNMEASURED[name]: None}), Gates()))[name]
    assert not gate.passed and gate.value is None and "could not be measured" in gate.note
    assert ("null" in gate.note) == (name not in FIXED), "only where a recipe can set it"


def test_the_fixed_gates_are_those_that_have_a_limit_whatever_the_recipe_says() -> None:
    """The gates of complete and undamaged files are always measured, so that no user is told to take their limit."""
    without_limits = Gates(**dict.fromkeys(Gates.model_fields))
    limited = {
        gate.name for gate in judge(good(worst_task_recovery=1.0, tasks={}), without_limits) if gate.limit is not None
    }
    assert limited - {"structure", "lossless", "finite", "files", "context"} == FIXED
    assert {gate.name for gate in judge(good(), Gates())} - FIXED >= QUALITY_GATES


def test_kl_divergence_has_a_limit_unless_the_recipe_says_null() -> None:
    assert by_name(judge(good(), Gates()))["kl_divergence"].limit == MAX_KL_DIVERGENCE
    assert by_name(judge(good(kl_divergence=9.0), Gates(max_kl_divergence=None)))["kl_divergence"].passed
    assert failed(Gates(), kl_divergence=0.3) == {"kl_divergence"}
    assert failed(Gates(max_kl_divergence=0.01)) == {"kl_divergence"}


def test_the_worst_matrix_and_block_are_named() -> None:
    gates = by_name(judge(good(matrices=matrix(scale_factor=1.05, offset=1.0), blocks=block(2.0)), Gates()))
    assert gates["weight_slope"].note == gates["weight_offset"].note == "b.weight"
    assert gates["block_error"].note == "block 1" and gates["block_error"].value == 2.0


@pytest.mark.parametrize("error", [0.0125, 0.11, 0.22])
def test_a_record_of_an_earlier_version_is_compared_with_fine_rounding(error: float) -> None:
    """Rounding in 8, 4 and 3 bits passes; the same with scales that are 5 % off does not."""
    noise = error**2
    assert slope_of(slope=1 - noise, error=error) == 0
    for factor in (0.95, 1.05):
        off = {"slope": factor * (1 - noise), "error": (factor**2 * noise + (1 - factor) ** 2) ** 0.5}
        assert slope_of(**off) > 0.03


@pytest.mark.parametrize("factor", [0.0, 0.01, 0.1])
def test_a_record_of_an_earlier_version_tells_scales_that_are_far_too_small(factor: float) -> None:
    assert slope_of(slope=factor, error=1 - factor) > 0.03


def test_another_matrix_has_no_slope_at_all() -> None:
    assert slope_of(slope=0.0, error=2**0.5) == pytest.approx(1.0)


def test_the_slopes_error_is_that_of_the_scales_or_of_the_matrix_whichever_is_larger() -> None:
    """A quarter of the noise of rounding is left to tuning."""
    right = {"slope": 0.9, "error": 0.4, "slope_excess": 0.02, "scale_factor": 1.01, "rounding_noise": 0.16}
    assert slope_of(**right) == pytest.approx(0.01)
    assert slope_of(**{**right, "scale_factor": 0.95}) == pytest.approx(0.05)
    assert slope_of(**{**right, "slope_excess": -0.9}) == pytest.approx(0.86)
    assert math.isnan(slope_of(**{**right, "slope": math.nan}))


def test_a_matrix_that_is_no_number_fails() -> None:
    nan = matrix(slope=math.nan, offset=math.nan, error=math.nan)
    assert failed(matrices=nan) == {"weight_slope", "weight_offset"}
    assert failed(blocks=block(math.nan)) == {"block_error"}


def test_what_a_model_has_not_is_not_compared() -> None:
    assert "vision_output" not in by_name(judge(good(vision=False, vision_difference=None), Gates()))
    assert "speculative_decoding" not in by_name(judge(good(speculative_agreement=None), Gates()))


def test_a_head_whose_acceptance_could_not_be_measured_does_not_pass_unless_nobody_asks() -> None:
    assert failed(mtp_acceptance_ratio=None) == {"mtp_acceptance_ratio"}
    assert failed(Gates(min_mtp_acceptance_ratio=None), mtp_acceptance_ratio=None) == set()


@pytest.mark.parametrize(("limit", "passed"), [(0.95, False), (None, None)])
def test_a_ratio_to_a_base_that_accepts_no_draft_is_undefined(limit: float | None, passed: bool | None) -> None:
    limits = Gates(min_mtp_acceptance_ratio=limit)
    gate = by_name(judge(good(mtp_acceptance_ratio=None, base_mtp_acceptance=0.0), limits))["mtp_acceptance_ratio"]
    assert (gate.value, gate.passed) == (None, passed)
    assert "is undefined, since none of the base's drafts is accepted" in gate.note
    assert "could not be measured" not in gate.note and ("set gates for it to null" in gate.note) == (limit is not None)


def test_a_checkpoint_without_a_head_has_no_gate_for_it() -> None:
    assert "mtp_acceptance_ratio" not in by_name(judge(good(head_kept=False), Gates()))


@pytest.mark.parametrize("name", ["perplexity_increase", "top1_agreement", "mtp_acceptance_ratio", "same_tokens"])
def test_a_value_that_is_not_a_number_does_not_pass(name: str) -> None:
    assert failed(**{name: math.nan}) == {name}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_models_gate_is_still_json(value: float) -> None:
    """A model that predicts nothing has a perplexity of nan or inf; --json must stay one JSON document."""
    for gate in judge(good(perplexity_increase=value), Gates()):
        assert json.loads(json.dumps(gate.to_json(), allow_nan=False))["name"] == gate.name


def test_a_limit_that_is_null_is_reported_and_not_compared() -> None:
    limits = Gates(max_perplexity_increase=None, min_top1_agreement=None, min_mtp_acceptance_ratio=None)
    gates = by_name(judge(good(perplexity_increase=9.0, top1_agreement=0.0), limits))
    assert gates["perplexity_increase"] == Gate("perplexity_increase", 9.0, None, True, "no limit asked for")
    assert gates["top1_agreement"].passed and gates["top1_agreement"].value == 0.0


def test_structure_is_compared_whatever_the_recipe_says() -> None:
    limits = Gates(max_perplexity_increase=None, min_top1_agreement=None, min_mtp_acceptance_ratio=None)
    assert failed(limits, unaccounted=["x"], altered=["x"], not_finite=["x"], files=["x"], same_tokens=0.5) == {
        "structure", "lossless", "finite", "files", "same_tokens",
    }  # fmt: skip


def test_a_gate_of_sentences_tells_the_first_and_counts_the_others() -> None:
    gates = by_name(judge(good(altered=["a differs", "b differs", "c differs"]), Gates()))
    assert gates["lossless"] == Gate("lossless", 3.0, 0.0, False, "a differs (and 2 more)")


def test_a_changed_limit_needs_no_new_value() -> None:
    strict = Gates(max_perplexity_increase=0.001)
    assert failed() == set() and failed(strict) == {"perplexity_increase"}


def test_a_gate_as_json_has_the_keys_of_the_contract() -> None:
    assert Gate("a", 0.5, 0.9, False, "low").to_json() == {
        "name": "a", "value": 0.5, "limit": 0.9, "passed": False, "note": "low",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "share"), [([], 1.0), ([7], 1.0), ([1, 1, 1, 2], 0.75), ([1, 2, 3, 4], 0.25), ([5] * 9 + [6], 0.9)]
)
def test_the_share_of_the_most_repeated_token_is_counted(tokens: list[int], share: float) -> None:
    assert most_repeated(tokens) == share


def test_the_task_that_kept_least_is_compared_and_named() -> None:
    score = {"metric": "acc", "base": 0.5, "ours": 0.5}
    tasks = {name: {**score, "recovery": kept} for name, kept in (("gsm8k", 1.01), ("humaneval", 0.9), ("mmlu", 0.99))}
    measured = good(tasks=tasks, worst_task_recovery=0.9)
    gate = by_name(judge(measured, Gates()))["task_recovery"]
    assert (gate.value, gate.limit, gate.passed, gate.note) == (0.9, 0.95, False, "humaneval")
    assert by_name(judge(measured, Gates(min_task_recovery=0.9)))["task_recovery"].passed
    assert failed(tasks={"hard": {**score, "recovery": None}}, worst_task_recovery=None) == {"task_recovery"}


def task(recovery: float, lost: int, gained: int, items: int = 400) -> dict[str, Any]:
    """A task on which the base is right, and the result is as often right as the flips say."""
    base = [1.0] * (items - gained) + [0.0] * gained
    paired = compare_pairs(base, [0.0] * lost + [1.0] * (items - lost), 0.02)
    return {"metric": "acc", "base": 1.0, "ours": recovery, "recovery": recovery, "paired": paired.model_dump()}


def recovery_gate(**tasks: dict[str, Any]) -> Gate:
    worst = min(found["recovery"] for found in tasks.values())
    return by_name(judge(good(tasks=tasks, worst_task_recovery=worst), Gates()))["task_recovery"]


def test_a_loss_in_a_task_fails_if_it_is_more_than_noise() -> None:
    gate = recovery_gate(good=task(1.0, 0, 0), bad=task(0.9, 48, 8))
    assert gate.failed and gate.value == 0.9 and gate.note == "bad: 48 lost and 8 gained of 400 items"
    assert gate.interval is not None and gate.interval[0] < 0.9 < gate.interval[1] < 0.95


def test_a_loss_in_a_task_that_may_be_noise_cannot_be_told_and_blocks_nothing() -> None:
    gate = recovery_gate(good=task(1.0, 0, 0), small=task(0.94, 5, 2, items=50))
    assert gate.passed is None and not gate.failed and gate.result == "cannot tell" and gate.value == 0.94
    assert re.fullmatch(r"small: 5 lost and 2 gained of 50 items, which may be noise: \d+ more would tell", gate.note)


def test_a_real_loss_is_named_before_a_larger_one_that_may_be_noise() -> None:
    gate = recovery_gate(small=task(0.85, 5, 2, items=50), bad=task(0.9, 48, 8))
    assert gate.failed and gate.value == 0.9 and gate.note.startswith("bad: ")


def test_a_recovery_whose_interval_lies_below_the_limit_fails_however_small_the_loss_is() -> None:
    measured = good(tasks={"t": task(1.0, 0, 0)}, worst_task_recovery=1.0)
    assert by_name(judge(measured, Gates(min_task_recovery=1.2)))["task_recovery"].failed
    assert by_name(judge(measured, Gates(min_task_recovery=1.005)))["task_recovery"].passed


def test_a_small_score_may_keep_less_where_it_is_equivalent_at_the_margin() -> None:
    gate = recovery_gate(hard=task(0.94, 1, 0))
    assert gate.passed and gate.value == 0.94 and "equivalent at the margin" in gate.note


def test_a_task_without_pairs_is_compared_as_it_is() -> None:
    plain = {"metric": "bleu", "base": 30.0, "ours": 27.0, "recovery": 0.9}
    gate = recovery_gate(plain=plain, good=task(1.0, 0, 0))
    assert gate.failed and gate.note == "plain"


def test_a_gate_that_cannot_tell_is_counted() -> None:
    gates = [Gate("a", 1.0, 1.0, True), Gate("b", 0.9, 1.0, None), Gate("c", None, None, None)]
    assert summary(gates) == "1 passed, 1 not measured, 1 cannot tell"
    assert summary([*gates, Gate("d", 0.0, 1.0, False)]) == "1 of 4 failed, 1 not measured, 1 cannot tell"
