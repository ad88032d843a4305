"""Gates on the worst domain: it is named, fails by more than chance, and shows what a mean over all hides."""

from __future__ import annotations

import math
from typing import Any

import pytest

from requant.tasks.recipe.recipe import Gates
from requant.tasks.validating.gates import Gate, judge
from tests.factories.measured import good

QUALITY = ("perplexity_increase", "kl_divergence", "top1_agreement", "mtp_acceptance_ratio")
GOOD: dict[str, Any] = {
    "tokens": 8192, "base_perplexity": 10.0, "perplexity": 10.1, "kl_divergence_p99": 0.3, "kl_noise_floor": 0.001,
    "perplexity_increase": 0.01, "perplexity_increase_interval": [0.005, 0.015],
    "kl_divergence": 0.05, "kl_divergence_interval": [0.04, 0.06],
    "top1_agreement": 0.95, "top1_agreement_interval": [0.94, 0.96],
    "mtp_acceptance_ratio": 0.99, "mtp_acceptance_ratio_interval": [0.98, 1.0],
}  # fmt: skip


def noted(name: str, note: str) -> str:
    """The note of a gate. That of the divergence also says of what its limit is made."""
    floor = "the limit is 0.25 and the base's noise floor of 0.001" if name == "kl_divergence" else ""
    return "; ".join(filter(None, [note, floor]))


def gates(
    limits: Gates | None = None, whole: dict[str, Any] | None = None, **domains: dict[str, Any]
) -> dict[str, Gate]:
    """Judge a good checkpoint with these domains; `whole` has changes to the values of all together."""
    values = {name: {**GOOD, **changes} for name, changes in domains.items()}
    measured = good(domains=values, kl_noise_floor=0.001, **(whole or {}))
    return {gate.name: gate for gate in judge(measured, limits or Gates())}


@pytest.mark.parametrize(
    ("name", "worse"),
    [("perplexity_increase", 0.03), ("kl_divergence", 0.2), ("top1_agreement", 0.9), ("mtp_acceptance_ratio", 0.96)],
)
def test_the_value_is_that_of_the_worst_domain_and_the_note_names_it(name: str, worse: float) -> None:
    gate = gates(code={}, prose={name: worse})[name]
    assert (gate.value, gate.passed, gate.note) == (worse, True, noted(name, "worst domain: prose"))


@pytest.mark.parametrize(
    ("name", "bad", "ends"),
    [
        ("perplexity_increase", 0.1, (0.09, 0.11)),
        ("kl_divergence", 0.5, (0.4, 0.6)),
        ("top1_agreement", 0.7, (0.6, 0.8)),
        ("mtp_acceptance_ratio", 0.8, (0.75, 0.85)),
    ],
)
def test_one_domain_fails_a_gate_although_the_whole_text_passes(
    name: str, bad: float, ends: tuple[float, float]
) -> None:
    found = gates(code={}, prose={name: bad, f"{name}_interval": list(ends)})
    assert {gate.name for gate in found.values() if gate.failed} == {name}
    assert found[name].value == bad
    assert found[name].note == noted(name, f"worst domain: prose, 95 % interval {ends[0]:.4g} to {ends[1]:.4g}")


def test_a_domain_whose_interval_reaches_the_limit_does_not_fail() -> None:
    """The worst of several domains is beyond a limit by chance more often than one is."""
    gate = gates(code={}, tools={"mtp_acceptance_ratio": 0.9, "mtp_acceptance_ratio_interval": [0.7, 1.1]})
    ratio = gate["mtp_acceptance_ratio"]
    assert ratio.passed and ratio.value == 0.9
    assert ratio.note == "worst domain: tools, 95 % interval 0.7 to 1.1, which reaches the limit"


def test_a_domain_without_an_interval_is_not_judged_by_itself() -> None:
    gate = gates(code={}, tools={"kl_divergence": 0.9, "kl_divergence_interval": None})["kl_divergence"]
    alone = "worst domain: tools, which has too few tokens to be judged by itself"
    assert gate.passed and gate.note == noted("kl_divergence", alone)


def test_all_domains_together_are_judged_by_the_value_itself() -> None:
    reaching = {"kl_divergence": 0.26, "kl_divergence_interval": [0.2, 0.3]}
    gate = gates(whole={"kl_divergence": 0.255}, code=reaching, prose=reaching)["kl_divergence"]
    assert (
        gate.failed and gate.value == 0.26 and gate.note.startswith("all domains together: 0.255; worst domain: code")
    )


def test_a_failing_domain_is_named_before_a_worse_one_that_may_be_chance() -> None:
    chance = {"kl_divergence": 0.4, "kl_divergence_interval": [0.1, 0.7]}
    sure = {"kl_divergence": 0.3, "kl_divergence_interval": [0.28, 0.32]}
    gate = gates(tools=chance, prose=sure)["kl_divergence"]
    assert gate.failed and gate.value == 0.3 and "prose" in gate.note


def test_the_limit_of_the_divergence_is_above_the_noise_floor_of_its_domain() -> None:
    noisy = {"kl_divergence": 0.3, "kl_divergence_interval": [0.29, 0.31], "kl_noise_floor": 0.1}
    gate = gates(code={}, prose=noisy)["kl_divergence"]
    assert gate.passed and gate.limit == pytest.approx(0.35)
    quiet = {**noisy, "kl_noise_floor": None}
    gate = gates(code={}, prose=quiet)["kl_divergence"]
    assert gate.failed and gate.limit == pytest.approx(0.25)
    assert gates(code={})["kl_divergence"].limit == pytest.approx(0.251), "and of a text without domains"


def test_a_limit_that_is_null_is_not_compared_in_any_domain() -> None:
    limits = Gates(**dict.fromkeys(Gates.model_fields))
    bad = {"kl_divergence": 9.0, "kl_divergence_interval": [8.0, 10.0]}
    gate = gates(limits, code={}, prose=bad)["kl_divergence"]
    assert (gate.value, gate.limit, gate.passed) == (9.0, None, True)
    assert gate.note == "no limit asked for; worst domain: prose"


def test_a_domain_in_which_the_base_accepts_no_draft_has_no_part_in_the_ratio() -> None:
    none = {"mtp_acceptance_ratio": None, "mtp_acceptance_ratio_interval": None}
    gate = gates(code={}, prose={"mtp_acceptance_ratio": 0.97}, tools=none)["mtp_acceptance_ratio"]
    assert gate.passed and gate.value == 0.97 and gate.note == "worst domain: prose"


def test_a_domain_whose_value_is_no_number_fails() -> None:
    name = "kl_divergence"
    gate = gates(code={}, prose={name: math.nan, f"{name}_interval": [math.nan, math.nan]})[name]
    assert gate.failed and gate.note == noted(name, "worst domain: prose")


@pytest.mark.parametrize("name", QUALITY)
def test_a_text_without_domains_is_judged_as_before(name: str) -> None:
    """Its value is compared, whatever its interval."""
    before, after = {gate.name: gate for gate in judge(good(), Gates())}, gates(text={})
    assert (after[name].value, after[name].passed, after[name].note) == (before[name].value, True, noted(name, ""))
    bad = {"perplexity_increase": 0.051, "kl_divergence": 0.26, "top1_agreement": 0.84, "mtp_acceptance_ratio": 0.94}
    wide = {f"{name}_interval": [-9.0, 9.0], name: bad[name]}
    assert gates(whole={name: bad[name]}, text=wide)[name].failed
