"""Rounds: a result does as many items as decide, in a fixed order, and the verdicts are right as often as promised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from requant.tasks.errors import EvaluationFailed
from requant.tasks.evaluate import compare_outcomes
from requant.tasks.evaluating.outcomes import Samples, logged_values
from requant.tasks.evaluating.rounds import Wanted, run_in_rounds
from requant.tasks.recipe.recipe import Eval
from requant.tasks.validating.measured import TaskScore
from requant.tasks.validating.paired import Verdict
from tests.factories.task_answers import ITEMS, Answers, Right, flip, right

ASKED = Eval(tasks=["t"])


def judged(base: Mapping[str, Right], ours: Mapping[str, Right], group: str = "") -> tuple[TaskScore, Answers]:
    """Run a result in rounds against its base, and return the comparison of the only task or group."""
    of_base, answers = Answers(base).outcomes(group), Answers(ours)
    found = compare_outcomes(of_base, run_in_rounds(of_base, ASKED.margin, "x 1", answers), ASKED)
    assert found.tasks is not None
    (score,) = found.tasks.values()
    return score, answers


def verdict(base: Right, ours: Right) -> Verdict:
    score, _ = judged({"t": base}, {"t": ours})
    assert score.paired is not None
    return score.paired.verdict


def test_an_equal_pair_is_equivalent_after_the_first_look_that_can_tell() -> None:
    base = {"t": right()}
    score, answers = judged(base, base)
    assert score.paired is not None and score.paired.verdict is Verdict.EQUIVALENT
    assert [len(wanted["t"]) for wanted in answers.asked] == [200, 200]
    assert score.samples == score.paired.items == 400 and score.recovery == 1.0
    assert score.base == score.ours == pytest.approx(0.7, abs=0.07)


def test_damage_stops_at_the_first_look_and_all_scores_are_of_the_same_items() -> None:
    base = right()
    score, answers = judged({"t": base}, {"t": flip(base, 0.2, 0.01)})
    assert score.paired is not None and score.paired.verdict is Verdict.WORSE and len(answers.asked) == 1
    done = np.array(answers.asked[0]["t"])
    assert score.samples == len(done) == 200 and score.base == pytest.approx(base[done].mean())
    assert score.recovery == pytest.approx(score.paired.recovery)


def test_a_task_whose_examples_are_drawn_item_by_item_is_one_round_and_has_the_interval_of_one_look() -> None:
    """Asked in rounds, lm-eval would draw other examples for an item than it drew for the base."""
    base = {"t": right()}
    drawn, answers = Answers(base).outcomes(num_fewshot=5, fewshot_config=None), Answers(base)
    ours = run_in_rounds(drawn, ASKED.margin, "x 1", answers)
    assert [list(wanted["t"]) for wanted in answers.asked] == [list(range(ITEMS))]
    several_looks = Answers(base).outcomes(num_fewshot=5, fewshot_config={"sampler": "first_n"})
    widths = []
    for of_base in (drawn, several_looks):
        (score,) = (compare_outcomes(of_base, ours, ASKED).tasks or {}).values()
        assert score.paired is not None
        low, high = score.paired.interval
        widths.append(high - low)
    assert widths[0] < widths[1]


@pytest.mark.parametrize(
    "config", [{}, {"num_fewshot": 0}, {"num_fewshot": 5, "fewshot_config": {"sampler": "first_n"}}]
)
def test_a_task_whose_prompts_are_fixed_still_ends_early(config: dict[str, Any]) -> None:
    base = {"t": right()}
    answers = Answers(base)
    run_in_rounds(Answers(base).outcomes(**config), ASKED.margin, "x 1", answers)
    assert len(answers.asked) == 2


def test_items_that_were_asked_with_other_prompts_are_no_pairs() -> None:
    base = {"t": right(items=4)}
    of_base, logged = Answers(base).outcomes(), Answers(base)({"t": range(4)})
    sample = {**logged["t"][0], "prompt_hash": "0" * 64}
    ids, _ = logged_values({"t": [sample, *logged["t"][1:]]}, ["t"], "acc")
    assert [one in of_base.items["t"].ids for one in ids] == [False, True, True, True]


def test_every_item_is_done_once_where_nothing_decides() -> None:
    base = right(items=500)
    score, answers = judged({"t": base}, {"t": flip(base, 0.05, 0.04)})
    places = [place for wanted in answers.asked for place in wanted["t"]]
    assert sorted(places) == list(range(500)) and len(answers.asked) == 2
    assert all(list(wanted["t"]) == sorted(wanted["t"]) for wanted in answers.asked), "lm-eval mixes them up otherwise"
    assert score.paired is not None and score.paired.verdict is Verdict.CANNOT_TELL and score.paired.more_items > 0


def test_the_items_of_a_round_are_spread_over_the_data_set_and_always_the_same() -> None:
    base = {"t": right()}
    (_, first), (_, second) = judged(base, base), judged(base, {"t": flip(base["t"], 0.0, 0.0)})
    assert first.asked == second.asked
    assert abs(float(np.mean(first.asked[0]["t"])) - ITEMS / 2) < ITEMS / 8


def test_a_group_is_one_task_and_its_members_get_their_share() -> None:
    base = {"large": right(items=2400), "small": right(items=800, seed=5)}
    score, answers = judged(base, base, group="both")
    assert score.paired is not None and score.paired.verdict is Verdict.EQUIVALENT and score.samples == 400
    large, small = (sum(len(wanted.get(task, ())) for wanted in answers.asked) for task in base)
    assert large + small == 400 and 50 < small < 150


def test_a_task_that_is_decided_is_not_asked_again() -> None:
    base = {"clear": right(), "unclear": right(seed=8)}
    of_base = Answers(base).outcomes()
    answers = Answers({"clear": ~base["clear"], "unclear": flip(base["unclear"], 0.05, 0.05)})
    made = run_in_rounds(of_base, ASKED.margin, "x 1", answers)
    assert ["clear" in wanted for wanted in answers.asked] == [True, *[False] * (len(answers.asked) - 1)]
    assert made.scores["clear"].samples == 200 and (made.scores["unclear"].samples or 0) > 1000


def test_an_answer_that_lacks_items_is_an_error() -> None:
    base = Answers({"t": right()}).outcomes()

    def answer(wanted: Wanted) -> Samples:
        return {"t": Answers({"t": right()})(wanted)["t"][1:]}

    with pytest.raises(EvaluationFailed, match=r"^lm-eval logged 199 values of acc for 200 items of t$"):
        run_in_rounds(base, ASKED.margin, "x 1", answer)


@pytest.mark.parametrize("seed", range(12))
def test_a_base_against_itself_is_never_worse_whatever_the_noise_of_its_engine(seed: int) -> None:
    """A run of the same checkpoint in another batch order flips up to some percent of the items, both ways."""
    base = right(seed=seed)
    for noise in (0.0, 0.002, 0.01):
        assert verdict(base, flip(base, noise, noise, seed + 1000)) is Verdict.EQUIVALENT, noise


@pytest.mark.parametrize("seed", range(12))
def test_two_seeds_of_one_recipe_are_no_difference(seed: int) -> None:
    base = right(seed=seed)
    one, other = (flip(base, 0.02, 0.015, seed + more) for more in (200, 300))
    assert verdict(one, other) in {Verdict.EQUIVALENT, Verdict.CANNOT_TELL}
