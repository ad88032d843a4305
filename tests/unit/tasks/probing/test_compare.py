"""The comparison of answers in pairs, and the gates."""

from __future__ import annotations

import random

import pytest

from requant.tasks.probing.compare import ProbeDocument, probe_gates, unmeasured_gates
from requant.tasks.probing.outcome import MEASURES, Outcome, ProbeResult, ProbeSet

LIMIT = 0.1


def answers(good: list[bool], measure: str = "answers_finished", not_measured: str = "") -> ProbeResult:
    outcomes = tuple(
        Outcome(question=f"q{n}", group=f"q{n}", measures={measure: value}, reason="" if value else "loop")
        for n, value in enumerate(good)
    )
    return ProbeResult(sets={MEASURES[measure]: ProbeSet(outcomes=outcomes, not_measured=not_measured)})


def gate(base: ProbeResult, ours: ProbeResult, limit: float | None = LIMIT, measure: str = "answers_finished"):  # type: ignore[no-untyped-def]
    gates = {one.name: one for one in probe_gates(ProbeDocument(base=base, ours=ours).summary, limit)}
    return gates[measure]


def shares(seed: int, count: int, share: float) -> list[bool]:
    chosen = random.Random(seed)
    return [chosen.random() < share for _ in range(count)]


def test_equal_answers_pass_without_a_loss() -> None:
    base = answers(shares(0, 128, 0.8))
    found = gate(base, base)
    assert (found.passed, found.value, found.limit) == (True, 0.0, LIMIT)


@pytest.mark.parametrize("seed", range(20))
def test_two_models_that_are_equally_good_never_fail(seed: int) -> None:
    """Answers that have nothing to do with each other: more noise than two samplings of one model have."""
    assert gate(answers(shares(seed, 128, 0.7)), answers(shares(1000 + seed, 128, 0.7))).passed is not False


def test_certain_damage_fails_and_says_how_large_it_is() -> None:
    good = shares(0, 128, 0.95)
    damaged = [value and n % 4 != 0 for n, value in enumerate(good)]
    found = gate(answers(good), answers(damaged))
    assert found.passed is False and found.value == pytest.approx(sum(good) / 128 - sum(damaged) / 128)
    assert "128 questions" in found.note and "between" in found.note


def test_what_is_not_certain_stops_nothing_and_is_not_called_good() -> None:
    good = [True] * 128
    found = gate(answers(good), answers([n % 10 != 0 for n in range(128)]))
    assert found.result == "cannot tell" and found.interval[0] < LIMIT < found.interval[1]
    assert found.passed is None and found.value == pytest.approx(13 / 128)


def test_a_base_that_cannot_do_it_has_nothing_to_lose() -> None:
    found = gate(answers(shares(0, 128, 0.03)), answers([False] * 128))
    assert (found.passed, found.value) == (None, None) and "nothing to lose" in found.note


def test_a_set_that_was_not_asked_says_why() -> None:
    found = gate(answers([], not_measured="no template"), answers([], not_measured="no template"))
    assert (found.passed, found.value, found.note) == (None, None, "no template")
    gates = unmeasured_gates(["tools", "retrieval"], LIMIT, "no vLLM")
    assert [one.name for one in gates] == ["tool_calls_valid", "tool_calls_right", "retrieval"]
    assert all(one.passed is None and one.note == "no vLLM" for one in gates)


def test_without_a_limit_a_measured_gate_passes() -> None:
    assert gate(answers([True] * 128), answers([False] * 128), None).passed is True


def test_only_questions_that_both_answered_are_compared() -> None:
    base, ours = answers([True] * 128), answers([True] * 64)
    (compared,) = (c for c in ProbeDocument(base=base, ours=ours).summary.comparisons if c.base is not None)
    assert compared.questions == 64


def test_questions_of_one_group_count_as_one_item() -> None:
    def grouped(good: list[bool]) -> ProbeResult:
        outcomes = tuple(
            Outcome(question=f"q{n}", group=f"g{n // 2}", measures={"answers_finished": value})
            for n, value in enumerate(good)
        )
        return ProbeResult(sets={"answers": ProbeSet(outcomes=outcomes)})

    good, bad = [True] * 128, [n % 8 > 1 for n in range(128)]
    each, together = gate(answers(good), answers(bad)), gate(grouped(good), grouped(bad))
    assert each.value == together.value == 0.25

    assert together.interval[0] < each.interval[0]


def test_reasons_and_lengths_are_counted_for_both() -> None:
    base, ours = answers([True] * 100 + [False] * 28), answers([True] * 90 + [False] * 38)
    (reason,) = ProbeDocument(base=base, ours=ours).summary.reasons
    assert (reason.set, reason.reason, reason.base, reason.ours) == ("answers", "loop", 28, 38)

    def found(good: list[bool]) -> ProbeResult:
        outcomes = tuple(
            Outcome(question=f"{4096 * 2 ** (n % 2)}/0/key {n}", group=str(n), measures={"retrieval": value})
            for n, value in enumerate(good)
        )
        return ProbeResult(sets={"retrieval": ProbeSet(outcomes=outcomes)})

    lengths = ProbeDocument(base=found([True] * 4), ours=found([True, False, True, False])).summary.lengths
    assert [(one.length, one.questions, one.base, one.ours) for one in lengths] == [(4096, 2, 2, 2), (8192, 2, 2, 0)]


def test_what_was_stored_is_read_again() -> None:
    document = ProbeDocument(base=answers([True, False]), ours=answers([True, True]))
    assert ProbeDocument.model_validate_json(document.model_dump_json()) == document
