"""Measuring by domain: damage in one domain fails its gates there, and a text without that domain does not show it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from requant.tasks.artifact import Manifest, file_of
from requant.tasks.errors import RecipeError
from requant.tasks.evaluation_text import MAX_DOMAINS, text_for_measuring
from requant.tasks.recipe.loader import load_recipe, parse_recipe
from requant.tasks.recipe.recipe import Gates, Validation
from requant.tasks.store import open_store
from requant.tasks.texts.text import BUILTIN_FOLDER, EVALUATION, Text
from requant.tasks.texts.validation import find_validation_text
from requant.tasks.validate import validate_folders, validate_key
from requant.tasks.validating import OTHER
from requant.tasks.validating.gates import Gate, judge
from requant.tasks.validating.measure import measure, run_settings
from requant.tasks.validating.model import load_tokenizer
from requant.tasks.validating.windows import read_domains
from tests.factories.checkpoints import raw_tensors, safetensors_bytes
from tests.factories.measured import measuring_little
from tests.factories.paths import TINY

TOKENS = 1024
CODE = EVALUATION.read_text()[:20_000]


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with measuring_little(windows=8, length=128, probe=16, prompts=1, generated=4, longest=128):
        yield


def file_with(path: Path, **domains: str) -> Path:
    rows = (json.dumps({"domain": name, "text": text}) + "\n" for name, text in domains.items())
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="module")
def prose() -> str:
    """Prose of the built-in text, of which the tiny model knows a little."""
    rows = map(json.loads, (BUILTIN_FOLDER / "mixed-evaluation.jsonl").read_text().splitlines())
    return "\n\n".join(row["text"] for row in rows if row["domain"] == "prose")[:20_000]


@pytest.fixture(scope="module")
def forgetful(prose: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny base that takes the tokens of prose that are in no code for each other."""
    folder = tmp_path_factory.mktemp("forgetful") / "copy"
    shutil.copytree(TINY, folder)
    tokenizer = load_tokenizer(TINY)
    code = set(tokenizer(CODE, add_special_tokens=False)["input_ids"])
    foreign = sorted(set(tokenizer(prose, add_special_tokens=False)["input_ids"]) - code)
    assert len(foreign) > 20
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        (shard,) = [path for path in folder.glob("*.safetensors") if name in raw_tensors(path)]
        shard.chmod(0o644)
        tensors = raw_tensors(shard)
        dtype, shape, data = tensors[name]
        rows = np.frombuffer(data, np.uint16).reshape(shape).copy()
        rows[foreign] = rows[np.roll(foreign, 1)]
        tensors[name] = (dtype, shape, rows.tobytes())
        shard.write_bytes(safetensors_bytes(tensors))
    return folder


def quality(checkpoint: Path, text: Path) -> dict[str, Gate]:
    return {gate.name: gate for gate in judge(validate_folders(checkpoint, TINY, text, tokens=TOKENS), Gates())}


def test_damage_in_one_domain_fails_there_and_passes_where_only_another_is_measured(
    forgetful: Path, prose: str, tmp_path: Path
) -> None:
    both = quality(forgetful, file_with(tmp_path / "both.jsonl", code=CODE, prose=prose))
    assert both["kl_divergence"].failed and "worst domain: prose" in both["kl_divergence"].note
    assert both["perplexity_increase"].failed and "worst domain: prose" in both["perplexity_increase"].note
    alone = quality(forgetful, file_with(tmp_path / "code.jsonl", code=CODE))
    assert alone["kl_divergence"].passed and alone["perplexity_increase"].passed and alone["top1_agreement"].passed


def test_memory_and_work_follow_the_number_of_tokens(tmp_path: Path) -> None:
    """Each domain has as many tokens as are asked for, however long its text is."""
    text = file_with(tmp_path / "text.jsonl", one=CODE, two=CODE)
    sizes = {}
    for tokens in (256, 512, 1024):
        found = measure(TINY, text, run_settings(TINY), tokens)
        assert found.tokens.shape == (2 * tokens // 128, 128)
        sizes[tokens] = found.hidden.nbytes + found.nll.nbytes + found.top1.nbytes + found.drafts.nbytes
    assert sizes[1024] == 2 * sizes[512] == 4 * sizes[256]


def test_rows_with_a_domain_make_the_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    rows = tmp_path / "rows.jsonl"
    kinds = [*(f"d{i}" for i in range(MAX_DOMAINS)), "one too many", "../etc", "d0", ""]
    rows.write_text("".join(json.dumps({"domain": kind, "text": f"a text of {kind}"}) + "\n" for kind in kinds))
    found = text_for_measuring(open_store(), find_validation_text(str(rows)), tmp_path / "work", TINY)
    texts = read_domains(found)
    assert texts["d0"] == "a text of d0\n\na text of d0" and len(texts) == MAX_DOMAINS + 1
    assert texts[OTHER] == "a text of one too many\n\na text of ../etc\n\na text of "


def test_a_mapping_has_a_text_for_each_domain_whatever_its_rows_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    file_with(tmp_path / "rows.jsonl", a="text a", b="text b")
    (tmp_path / "plain.txt").write_text("plain text\u2028with a line separator")
    sources = {"mine": str(tmp_path / "rows.jsonl"), "code": str(tmp_path / "plain.txt")}
    text = find_validation_text(sources)
    found = text_for_measuring(open_store(), text, tmp_path / "work", TINY)
    assert read_domains(found) == {"mine": "text a\n\ntext b", "code": "plain text\u2028with a line separator"}
    assert text.name == "mine: rows.jsonl, code: plain.txt"
    other = find_validation_text({"mine": sources["code"], "code": sources["mine"]})
    assert text.digest != other.digest, "the domain is a part of what is measured"


def test_what_is_measured_is_in_the_key(tmp_path: Path) -> None:
    files, text = Manifest.of([file_of(TINY, "config.json")]), Text("t", "a" * 64)
    asked = [parse_recipe({"base": {"repo_id": "a/b"}, "validation": part}) for part in ({}, {"tokens": 4096})]
    assert len({validate_key(recipe, files, files, text) for recipe in asked}) == 2


def test_a_recipe_names_one_text_or_one_for_each_domain() -> None:
    assert Validation(text={"code": "builtin:python-evaluation", "chat": "a/b@main"}).tokens is None
    assert (
        parse_recipe({"base": {"repo_id": "a/b"}}).digest
        == parse_recipe({"base": {"repo_id": "a/b"}, "validation": {"tokens": None}}).digest
    )


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        ({"text": {}}, "validation.text"),
        ({"text": {"a b": "x/y"}}, "a b"),
        ({"text": {"code": ""}}, "validation.text"),
        ({"text": {"code": "builtin:nothing"}}, "builtin:nothing does not exist"),
        ({"text": {f"d{i}": "x/y" for i in range(17)}}, "validation.text"),
        ({"tokens": 100}, "validation.tokens"),
        ({"tokens": "many"}, "validation.tokens"),
    ],
)
def test_a_text_or_a_number_of_tokens_that_cannot_be_is_refused(validation: Any, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe({"base": {"repo_id": "a/b"}, "validation": validation})
    print(refused.value)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_file_of_one_domain_is_named_by_its_key(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: {repo_id: a/b}\nvalidation: {text: {code: ./mine.txt}}\n")
    with pytest.raises(RecipeError, match=r"^validation\.text\.code: the file .*mine\.txt does not exist"):
        load_recipe(recipe)
    (tmp_path / "mine.txt").write_text("x")
    assert load_recipe(recipe).validation.text == {"code": str(tmp_path / "mine.txt")}
