"""What is tracked, and by what it is told that a base has changed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from requant.flows.last_run import LastRun, first_commit, last_run, limits_digest, remember_run
from requant.flows.watching import find_due, load_tracked
from requant.tasks.errors import RecipeError
from requant.tasks.hub.rate_limit import Pace
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from tests.factories.adapters import lora_tensors, write_adapter
from tests.factories.pico import pico_base

FILES = (
    HubFile(".gitattributes", 10, "a1", None),
    HubFile("README.md", 20, "a2", None),
    HubFile("config.json", 30, "a3", None),
    HubFile("model.safetensors", 40, "a4", "5" * 64),
    HubFile("pytorch_model.bin", 50, "a5", "6" * 64),
)
BASE = Revision("a/b", "1" * 40, FILES)
RECIPE = parse_recipe({"base": {"repo_id": "a/b"}})


def changed(of: str, **changes: object) -> Revision:
    files = tuple(replace(f, **changes) if f.path == of else f for f in FILES)  # type: ignore[arg-type]
    return Revision("a/b", "2" * 40, files)


@pytest.mark.parametrize("path", ["README.md", ".gitattributes", "pytorch_model.bin"])
def test_what_no_result_depends_on_changes_no_content(path: str) -> None:
    assert changed(path, size=9, blob_id="b", sha256="7" * 64).content == BASE.content


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("config.json", {"blob_id": "b3"}),
        ("model.safetensors", {"sha256": "8" * 64}),
        ("model.safetensors", {"size": 41}),
        ("config.json", {"path": "config2.json"}),
    ],
)
def test_what_a_result_depends_on_changes_the_content(path: str, changes: dict[str, object]) -> None:
    assert changed(path, **changes).content != BASE.content


def test_a_file_more_or_less_changes_the_content() -> None:
    more = Revision("a/b", "2" * 40, (*FILES, HubFile("tokenizer.json", 1, "c", None)))
    less = Revision("a/b", "2" * 40, FILES[:3])
    assert len({BASE.content, more.content, less.content}) == 3


def test_the_last_run_of_a_recipe_is_remembered_and_replaced(store: Store) -> None:
    assert last_run(store, RECIPE) is None
    remember_run(store, RECIPE, BASE, "rejected")
    assert last_run(store, RECIPE) == LastRun("a/b", BASE.sha, BASE.content, "rejected", limits_digest(RECIPE))
    remember_run(store, RECIPE, changed("config.json", size=1), "published")
    last = last_run(store, RECIPE)
    assert last is not None and (last.sha, last.status) == ("2" * 40, "published")
    other = parse_recipe({"base": {"repo_id": "a/b"}, "mtp": "drop"})
    assert last_run(store, other) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"sha": "x"}', '{"what": 1}', "1"])
def test_a_damaged_record_is_none(text: str, store: Store) -> None:
    store.put_fact("last-runs", RECIPE.digest, text)
    assert last_run(store, RECIPE) is None


def test_a_content_is_named_by_the_commit_that_had_it_first(store: Store) -> None:
    assert first_commit(store, RECIPE, BASE) == "1" * 40
    assert first_commit(store, RECIPE, changed("README.md", size=1)) == "1" * 40
    assert first_commit(store, RECIPE, changed("config.json", size=1)) == "2" * 40


def write(folder: Path, name: str, document: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(document))


def test_recipes_are_read_in_order_each_once_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    write(tmp_path, "b.yaml", {"base": {"repo_id": "x/one"}})
    write(tmp_path, "a.yaml", {"base": {"repo_id": "x/two"}})
    write(tmp_path, "c.yaml", {"base": {"repo_id": "x/one", "revision": "main"}})
    write(tmp_path, "d.yaml", {"base": {}})
    write(tmp_path, "notes.txt", "no recipe")
    tracked, problems = load_tracked(tmp_path)
    assert [t.name for t in tracked] == ["a.yaml", "b.yaml"]
    assert [(p.name, p.error) for p in problems] == [("d.yaml", "base.repo_id is missing: every recipe needs it")]


@pytest.mark.parametrize(
    "keys",
    [{"quantize": {"calibration": f"/{'a' * 300}.txt"}}, {"validation": {"text": "/a\0b.txt"}},
     {"eval": {"tasks": ["x"], "definitions": "a" * 5000}, "allow_remote_code": True}],
    ids=["long", "nul", "longer"],
)  # fmt: skip
def test_a_path_that_no_file_can_have_stops_no_other_recipe(keys: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", {"base": {"repo_id": "x/one"}, **keys})
    write(tmp_path, "b.yaml", {"base": {"repo_id": "x/two"}})
    tracked, problems = load_tracked(tmp_path)
    assert [t.name for t in tracked] == ["b.yaml"]
    assert [p.name for p in problems] == ["a.yaml"] and "does not exist" in problems[0].error


def test_only_the_recipes_of_a_repo_are_looked_at_however_it_is_spelt(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", {"base": {"repo_id": "X/One"}})
    write(tmp_path, "b.yaml", {"base": {"repo_id": "x/other"}})
    assert [t.name for t in load_tracked(tmp_path, {"x/one", "x/unknown"})[0]] == ["a.yaml"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the folder .*nowhere does not exist: name a folder of recipes"):
        load_tracked(tmp_path / "nowhere")


def test_a_recipe_sent_through_json_is_the_same_recipe() -> None:
    document = {"base": {"repo_id": "a/b"}, "gates": {"max_block_error": 1}, "benchmark": {"flags": {"x": 1.0}}}
    recipe = parse_recipe(document)
    assert Recipe.model_validate(recipe.model_dump(mode="json")).digest == recipe.digest


def test_a_rejected_base_is_run_again_once_the_recipe_has_other_limits() -> None:
    """Switching a limit off leaves the digest alone where null was its default before."""
    off = parse_recipe({"base": {"repo_id": "a/b"}, "gates": {"max_kl_divergence": None}})
    assert off.digest == RECIPE.digest
    rejected, published = (
        LastRun("a/b", BASE.sha, BASE.content, status, limits_digest(RECIPE)) for status in ("rejected", "published")
    )
    assert rejected.settles(RECIPE, BASE) and not rejected.settles(off, BASE)
    assert published.settles(off, BASE) and not published.settles(RECIPE, changed("config.json", size=1))
    assert LastRun("a/b", BASE.sha, BASE.content, "rejected").settles(off, BASE)  # of a version that kept no limits


def test_a_changed_folder_is_due_and_no_webhook_asks_for_it(store: Store, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "tuned")
    write(tmp_path / "recipes", "a.yaml", {"base": {"folder": "../tuned", "repo_id": "x/one"}})
    assert load_tracked(tmp_path / "recipes", {"x/one"})[0] == [], "what changes in that repo is not in the folder"
    tracked, _ = load_tracked(tmp_path / "recipes")
    with Pace() as pace:
        (due,), problems, _ = find_due(store, tracked, pace)
        assert due.base.repo_id == "tuned" and not problems
        remember_run(store, due.recipe, due.base, "published")
        assert find_due(store, tracked, pace) == ([], [], [])
        (base / "README.md").write_text("another card")
        assert find_due(store, tracked, pace) == ([], [], [])
        (base / "generation_config.json").write_text("{}")
        ((again,), _, _) = find_due(store, tracked, pace)
        assert again.base.content != due.base.content
        shutil.rmtree(base)
        assert [p.name for p in find_due(store, tracked, pace)[1]] == ["a.yaml"]


def test_a_changed_adapter_is_due_and_is_another_run_of_the_same_base(store: Store, tmp_path: Path) -> None:
    tensors = lora_tensors(pico_base(tmp_path / "base"))
    adapter = write_adapter(tmp_path / "lora", tensors)
    write(tmp_path / "recipes", "a.yaml", {"base": "../base", "adapter": "../lora"})
    write(tmp_path / "recipes", "b.yaml", {"base": "../base"})
    write(tmp_path / "recipes", "c.yaml", {"base": "x/one", "adapter": "X/lora"})
    assert [t.name for t in load_tracked(tmp_path / "recipes", {"x/lora"})[0]] == ["c.yaml"]
    tracked = [one for one in load_tracked(tmp_path / "recipes")[0] if one.name != "c.yaml"]
    with Pace() as pace:
        (due, plain), problems, _ = find_due(store, tracked, pace)
        assert not problems and due.base.sha == plain.base.sha and due.base.content != plain.base.content
        for one in (due, plain):
            remember_run(store, one.recipe, one.base, "published")
        assert find_due(store, tracked, pace) == ([], [], [])
        (adapter / "README.md").write_text("another card")
        assert find_due(store, tracked, pace) == ([], [], [])
        write_adapter(adapter, {name: 2 * one for name, one in tensors.items()})
        ((again,), _, _) = find_due(store, tracked, pace)
        assert again.name == "a.yaml" and again.base.sha == due.base.sha
        assert first_commit(store, due.recipe, due.base) != first_commit(store, due.recipe, again.base)
        (adapter / "adapter_model.safetensors").unlink()
        assert [p.name for p in find_due(store, tracked, pace)[1]] == ["a.yaml"]
