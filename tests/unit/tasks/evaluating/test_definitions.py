"""The definitions of lm-eval's tasks: which there are, and what is refused. The real lm-eval is in integration."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from requant.tasks.errors import RecipeError
from requant.tasks.evaluate import evaluation_key
from requant.tasks.evaluating.definitions import _is_complete, _leaves, check_tasks
from requant.tasks.recipe.loader import load_recipe, parse_recipe
from requant.tasks.recipe.recipe import Eval
from tests.factories.paths import ROOT


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


def test_a_recipe_that_asks_for_tasks_without_lm_eval_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"^eval.tasks: gsm8k needs lm-eval: pip install 'requant\[eval\]'$"):
        check_tasks(recipe())
    check_tasks(None)


REFUSED = r"^eval.definitions ./tasks can run Python: trust it with allow_code: true in eval$"


@pytest.mark.parametrize(
    ("of_tasks", "of_base", "allowed"),
    [
        (None, False, False),
        (False, False, False),
        (False, True, False),  # what is said of the tasks counts
        (True, False, True),
        (True, True, True),
        (None, True, True),  # recipes of before have one word for both
    ],
)
def test_own_definitions_are_code_and_need_a_word_of_their_own(
    of_tasks: bool | None, of_base: bool, allowed: bool
) -> None:
    word = {} if of_tasks is None else {"allow_code": of_tasks}
    section = {"tasks": ["x"], "definitions": "./tasks", **word}
    document = {"base": {"repo_id": "a/b"}, "allow_remote_code": of_base, "eval": section}
    if not allowed:
        with pytest.raises(RecipeError, match=REFUSED):
            parse_recipe(document)
        return
    recipe = parse_recipe(document)
    assert recipe.allow_remote_code is of_base, "the word for the tasks allows nothing of the base"


def test_the_word_for_the_tasks_is_in_no_digest_unless_it_is_used() -> None:
    document: dict[str, Any] = {"base": {"repo_id": "a/b"}, "eval": {"tasks": ["gsm8k"]}}
    plain, null = parse_recipe(document), parse_recipe({**document, "eval": {"tasks": ["gsm8k"], "allow_code": None}})
    used = parse_recipe({**document, "eval": {"tasks": ["gsm8k"], "allow_code": True}})
    assert plain.digest == null.digest != used.digest
    assert evaluation_key(plain) == evaluation_key(used), "scores do not depend on it"


def test_the_word_for_both_is_told_to_be_wide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "recipe.yaml"
    for word, warnings in (("allow_remote_code: true\neval: {", 1), ("eval: {allow_code: true, ", 0)):
        path.write_text(f"base: {{repo_id: a/b}}\n{word}tasks: [x], definitions: mine}}\n")
        caplog.clear()
        load_recipe(path)
        assert ["allow_code: true in eval" in record.message for record in caplog.records] == [True] * warnings


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
    "tasks: [a], engine: vllm": "eval.engine",
    "tasks: [a], margin: 0": "eval.margin",
    "tasks: [a], margin: 1.5": "eval.margin",
    "tasks: [a], stop_early: 1": "eval.stop_early",
    "limit: 5": "eval.tasks is missing",
}


@pytest.mark.parametrize("section", WRONG)
def test_a_wrong_section_is_refused_with_its_key(section: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {{repo_id: a/b}}\neval: {{{section}}}\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert WRONG[section] in str(refused.value)


def test_the_example_of_an_own_task_is_data_and_trusts_nothing_of_the_base() -> None:
    recipe = load_recipe(ROOT / "examples" / "own-evaluation.yaml")
    assert recipe.eval is not None and recipe.eval.definitions is not None and not recipe.allow_remote_code
    folder = Path(recipe.eval.definitions)
    assert {path.suffix for path in folder.iterdir()} == {".yaml", ".jsonl"}
    task = yaml.safe_load((folder / "opening_hours.yaml").read_text())  # it refuses !function
    assert [task["task"]] == recipe.eval.tasks
    questions = [json.loads(line) for line in (ROOT / task["dataset_kwargs"]["data_files"]["test"]).open()]
    assert [len(one["answers"]) > one["right"] >= 0 and bool(one["question"]) for one in questions] == [True] * 8
