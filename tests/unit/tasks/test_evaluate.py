"""lm-eval's tasks: what is compared, what a key reads, what is refused. The real lm-eval is in integration."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from requant.tasks.errors import RecipeError
from requant.tasks.evaluate import Score, _is_complete, _leaves, _scores, check_tasks, evaluation_key, recovery
from requant.tasks.recipe.loader import load_recipe, parse_recipe
from requant.tasks.recipe.recipe import Eval
from requant.tasks.validating.gates import worst_task


def score(value: float, *, more: bool = True) -> Score:
    return Score(metric="acc", value=value, stderr=0.01, samples=200, higher_is_better=more)


def test_recovery_is_the_share_of_the_bases_score_and_the_worst_task_counts() -> None:
    found = recovery({"a": score(0.8), "b": score(0.5)}, {"a": score(0.84), "b": score(0.4)})
    assert found.tasks is not None
    assert found.tasks["a"].recovery == pytest.approx(1.05)
    assert found.worst_task_recovery == found.tasks["b"].recovery == pytest.approx(0.8)
    assert worst_task(found.tasks) == "b"
    assert {"metric", "base", "ours", "recovery"} <= set(found.to_json()["tasks"]["a"])


def test_where_less_is_better_recovery_is_the_bases_over_ours() -> None:
    found = recovery({"ppl": score(10.0, more=False)}, {"ppl": score(12.5, more=False)})
    assert found.worst_task_recovery == pytest.approx(0.8)


def test_a_task_on_which_the_base_scores_nothing_shows_nothing() -> None:
    found = recovery({"a": score(0.8), "hard": score(0.0)}, {"a": score(0.8), "hard": score(0.0)})
    assert found.tasks is not None
    assert found.tasks["hard"].recovery is None and found.worst_task_recovery is None
    assert worst_task(found.tasks) == "hard"


def test_a_task_that_was_lost_altogether_has_recovery_zero() -> None:
    assert recovery({"a": score(0.8)}, {"a": score(0.0)}).worst_task_recovery == 0.0


def test_the_first_metric_of_a_task_is_its_score() -> None:
    entry = {"alias": "x", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.7}
    (found,) = _scores({"results": {"x": entry}, "higher_is_better": {"x": {"acc": True}}}).values()
    assert found.to_json() == {"metric": "acc", "value": 0.5, "stderr": 0.1, "samples": 9, "higher_is_better": True}


def test_a_metric_behind_a_filter_says_so_and_a_missing_error_is_none() -> None:
    entry = {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"}
    (found,) = _scores({"results": {"x": entry}, "higher_is_better": {}}).values()
    assert (found.metric, found.stderr) == ("exact_match, strict-match", None)


def test_members_of_an_aggregated_group_are_in_their_group() -> None:
    results = {
        "mmlu": {"acc,none": 0.5},
        "mmlu_law": {"acc,none": 0.4},
        "list": {"alias": "list"},
        "b": {"acc,none": 0.3},
    }
    members = {"mmlu": ["mmlu_law"], "list": ["b"]}
    found = _scores({"results": results, "higher_is_better": {}, "group_subtasks": members})
    assert list(found) == ["mmlu", "b"]


def entry(kind: str, tags: tuple[str, ...] = (), **config: Any) -> Any:
    return SimpleNamespace(kind=SimpleNamespace(name=kind), cfg=config, tags=set(tags))


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("a", True),
        ("tag", True),
        ("group", True),
        ("absent", False),
        ("group with an absent one", False),
        ("group with one of no name", False),
        ("circle", False),
    ],
)
def test_own_tasks_suffice_if_all_that_they_stand_for_is_there(name: str, whole: bool) -> None:
    known = {
        "a": entry("TASK", task="a"),
        "tag": entry("TAG", tags=("a",)),
        "group": entry("GROUP", task=["tag", {"task": "a", "num_fewshot": 0}]),
        "group with an absent one": entry("GROUP", task=["a", "gsm8k"]),
        "group with one of no name": entry("GROUP", task=["a", {"task": ["a"]}]),
        "circle": entry("GROUP", task=["circle"]),
    }
    assert _is_complete(known, name) is whole


def test_groups_and_tags_stand_for_their_tasks_also_in_a_circle() -> None:
    known = {
        "a": entry("TASK", task="a"),
        "b": entry("TASK", task="b"),
        "tag": entry("TAG", tags=("a",)),
        "group": entry("GROUP", task=["tag", {"task": "b", "num_fewshot": 1}, "group", "nowhere"]),
    }
    assert sorted(leaf["task"] for leaf in _leaves(known, "group")) == ["a", "b"]
    assert list(_leaves(known, "nowhere")) == []


def recipe(**changes: Any) -> Eval:
    parsed = parse_recipe(
        {"base": {"repo_id": "a/b"}, "allow_remote_code": True, "eval": {"tasks": ["gsm8k"], **changes}}
    ).eval
    assert parsed is not None
    return parsed


def test_what_is_asked_is_part_of_a_key_and_the_batch_size_is_not(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("task: x")
    plain = evaluation_key(recipe())
    assert evaluation_key(recipe(batch_size=1)) == plain and evaluation_key(None) == {}
    own = [evaluation_key(recipe(definitions=str(tmp_path)))]
    (tmp_path / "task.yaml").write_text("task: y")
    own.append(evaluation_key(recipe(definitions=str(tmp_path))))
    others = [
        evaluation_key(recipe(**c))
        for c in ({"limit": 5}, {"num_fewshot": 0}, {"chat_template": True}, {"tasks": ["b"]})
    ]
    assert all(a != b for i, a in enumerate([plain, *own, *others]) for b in [plain, *own, *others][:i])
    assert str(tmp_path) not in str(own)


def test_a_recipe_that_asks_for_tasks_without_lm_eval_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"^eval.tasks: gsm8k needs lm-eval: pip install 'requant\[eval\]'$"):
        check_tasks(recipe())
    check_tasks(None)


def test_own_definitions_are_code_and_need_the_word() -> None:
    document = {"base": {"repo_id": "a/b"}, "eval": {"tasks": ["x"], "definitions": "./tasks"}}
    with pytest.raises(RecipeError, match=r"^eval.definitions ./tasks can run Python: trust it with allow_remote_code"):
        parse_recipe(document)
    assert parse_recipe({**document, "allow_remote_code": True}).eval is not None


def test_own_definitions_are_relative_to_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: {repo_id: a/b}\nallow_remote_code: true\neval: {tasks: [x], definitions: mine}\n")
    with pytest.raises(RecipeError, match=r"^eval.definitions: the folder .*/mine does not exist"):
        load_recipe(path)
    (tmp_path / "mine").mkdir()
    loaded = load_recipe(path).eval
    assert loaded is not None and loaded.definitions == str(tmp_path / "mine")


WRONG = {
    "tasks: []": "eval.tasks",
    "tasks: gsm8k": "eval.tasks",
    "tasks: [gsm8k, gsm8k]": "name each task once",
    "tasks: ['../x']": "eval.tasks",
    'tasks: ["a\\nb"]': "eval.tasks",
    "tasks: [5]": "eval.tasks",
    "tasks: [a], limit: 0": "eval.limit",
    "tasks: [a], num_fewshot: -1": "eval.num_fewshot",
    "tasks: [a], fewshot: 5": "did you mean num_fewshot?",
    "limit: 5": "eval.tasks is missing",
}


@pytest.mark.parametrize("section", WRONG)
def test_a_wrong_section_is_refused_with_its_key(section: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {{repo_id: a/b}}\neval: {{{section}}}\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert WRONG[section] in str(refused.value)
