"""The outcomes in lm-eval's tasks: what is read of its results, and how items are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from requant.tasks.evaluating.outcomes import Items, Outcomes, Reading, Score, compare_items, read_outcomes
from requant.tasks.validating.paired import Verdict


def read_scores(results: dict[str, Any]) -> dict[str, Score]:
    return read_outcomes(results, "x 1").scores


def test_the_first_metric_of_a_task_is_its_score() -> None:
    entry = {"alias": "x", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.7}
    (found,) = read_scores({"results": {"x": entry}, "higher_is_better": {"x": {"acc": True}}}).values()
    assert found.to_json() == {"metric": "acc", "value": 0.5, "stderr": 0.1, "samples": 9, "higher_is_better": True}


def test_a_metric_behind_a_filter_says_so_and_a_missing_error_is_none() -> None:
    entry = {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"}
    (found,) = read_scores({"results": {"x": entry}, "higher_is_better": {}}).values()
    assert (found.metric, found.stderr) == ("exact_match, strict-match", None)


def test_members_of_an_aggregated_group_are_in_their_group() -> None:
    results = {
        "mmlu": {"acc,none": 0.5},
        "mmlu_law": {"acc,none": 0.4},
        "list": {"alias": "list"},
        "b": {"acc,none": 0.3},
    }
    members = {"mmlu": ["mmlu_law"], "list": ["b"]}
    found = read_scores({"results": results, "higher_is_better": {}, "group_subtasks": members})
    assert list(found) == ["mmlu", "b"]


SECRET = "the text of a data set that must not be spread"
LOG_LIKELIHOODS = [-3.0, -1.0, -2.0]
PAIRS = [(-3.0, 2), (-1.0, 1), (-2.0, 5)]


def results(values: Sequence[Any], score: float, metric: str = "m") -> dict[str, Any]:
    """What lm-eval returns for one task with these values of its items."""
    samples = [
        {
            "doc_id": place,
            "doc_hash": f"{place}a" * 32,
            "prompt_hash": f"{place}b" * 32,
            "filter": "none",
            metric: value,
            "doc": {"question": SECRET},
        }
        for place, value in enumerate(values)
    ]
    return {"results": {"t": {f"{metric},none": score}}, "higher_is_better": {}, "samples": {"t": samples}}


@pytest.mark.parametrize(
    ("values", "score", "reading"),
    [
        ([1.0, 0.0, True, False], 0.5, Reading.MEAN),
        (LOG_LIKELIHOODS, math.exp(2.0), Reading.PERPLEXITY),
        (PAIRS, math.exp(6 / 8), Reading.WEIGHTED_PERPLEXITY),
        (PAIRS, 6 / 8 / math.log(2), Reading.BITS_PER_BYTE),
    ],
)
def test_items_are_read_as_what_makes_the_score(values: list[Any], score: float, reading: Reading) -> None:
    items = read_outcomes(results(values, score), "x 1").items["t"]
    assert items.reading is reading and items.score == pytest.approx(score)
    assert len(items.ids) == len(items.values) == len(values) and items.ids[1] == "t/1/1a1a1a1a-1b1b1b1b"


@pytest.mark.parametrize("values", [[], [("reference", "answer")], [[1, 2, 3]], [1.0, 1.0], [(-1.0, 0)], [None]])
def test_a_score_that_items_do_not_make_has_none(values: list[Any]) -> None:
    found = read_outcomes(results(values, 0.5), "x 1")
    assert found.items == {} and found.scores["t"].value == 0.5


def test_the_items_of_a_group_are_those_of_its_members() -> None:
    document = results([1.0, 1.0, 0.0], 2 / 3)
    document["samples"]["u"] = [{**sample, "m": 0.0} for sample in document["samples"]["t"][:1]]
    document["results"] |= {"u": {"m,none": 0.0}, "both": {"m,none": 0.5}}
    found = read_outcomes({**document, "group_subtasks": {"both": ["t", "u"]}}, "x 1")
    assert list(found.scores) == list(found.items) == ["both"]
    assert [item.split("/")[0] for item in found.items["both"].ids] == ["t", "t", "t", "u"]
    assert read_outcomes({**document, "group_subtasks": {}}, "x 1").items.keys() == {"t", "u"}


def test_what_is_kept_has_no_text_of_a_data_set_and_is_read_back() -> None:
    found = read_outcomes(results(PAIRS, math.exp(6 / 8)), "x 1")
    text = json.dumps(found.to_json())
    assert SECRET not in text and Outcomes.model_validate_json(text) == found


def items(values: Sequence[float], reading: Reading = Reading.MEAN, content: str = "a") -> Items:
    made = Items.read([f"t/{place}/{content}" for place in range(len(values))], list(values), reading)
    assert made is not None
    return made


def verdict(base: Items, ours: Items, *, more: bool = True) -> Verdict | None:
    found = compare_items(base, ours, 0.02, higher_is_better=more, early_stop=False)
    return found.verdict if found else None


def test_items_whose_content_has_changed_are_no_pairs() -> None:
    assert verdict(items([1.0] * 400), items([1.0] * 400, content="b")) is None
    both = items([1.0] * 400).and_more(items([0.0] * 400, content="b"))
    found = compare_items(items([1.0] * 400), both, 0.02, higher_is_better=True, early_stop=False)
    assert found is not None and found.items == 400 and found.difference == 0


def test_the_margin_of_a_score_without_bounds_is_a_share_of_the_bases() -> None:
    base, near, far = ([value + shift for value in (30.0, 50.0)] * 200 for shift in (0.0, -0.5, -2.0))
    assert verdict(items(base), items(near)) is Verdict.EQUIVALENT and verdict(items(base), items(far)) is Verdict.WORSE
    assert verdict(items(base), items(far), more=False) is Verdict.BETTER


def test_the_margin_of_a_perplexity_is_a_share_of_it() -> None:
    base, near, far = ([value + shift for value in (-30.0, -50.0)] * 200 for shift in (0.0, -0.01, -0.05))
    likelihoods = [items(values, Reading.PERPLEXITY) for values in (base, near, far)]
    assert verdict(likelihoods[0], likelihoods[1], more=False) is Verdict.EQUIVALENT
    assert verdict(likelihoods[0], likelihoods[2], more=False) is Verdict.WORSE


def test_a_value_that_is_no_number_gives_no_verdict() -> None:
    assert verdict(items([1.0] * 400), items([1.0] * 399 + [math.nan])) is None


def test_a_base_that_scores_nothing_on_a_scale_without_bounds_gives_no_verdict() -> None:
    assert verdict(items([-1.0, 1.0] * 200), items([-1.0, 1.0] * 200)) is None
