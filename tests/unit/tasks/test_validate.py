"""validate: what its key reads. What it measures is in test_measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from requant.tasks import validate as stage
from requant.tasks.artifact import File, Manifest
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import RecipeError
from requant.tasks.evaluation_text import text_for_measuring
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import open_store
from requant.tasks.texts.text import Text, find_text
from requant.tasks.validate import MeasurementKey, compared_part, scales_rounded_to, validate_key
from requant.tasks.validating.measure import VERSION
from requant.tasks.validating.measured import Measured
from requant.tasks.validating.model import RunSettings
from tests.factories.bases import prepared
from tests.factories.checkpoints import write_quantized
from tests.factories.measured import good
from tests.factories.paths import TINY
from tests.factories.pico import pico_base

A, B = "a" * 64, "b" * 64
BASE = Manifest.of(File(p, 1, A) for p in ("config.json", "model.safetensors", "README.md", ".gitattributes"))
TEXT = Text("builtin:python-evaluation", A)
MADE = Manifest.of([File("model.safetensors", 2, B)])


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, **changes})


def changed(path: str) -> Manifest:
    return Manifest.of(replace(f, sha256=B) if f.path == path else f for f in BASE.files)


def test_a_changed_limit_measures_nothing_again() -> None:
    key = validate_key(recipe(), BASE, MADE, TEXT)
    others = ({"gates": {"min_top1_agreement": 0.1}}, {"publish": {"repo_id": "me/x"}}, {"quantize": {"iters": 1}})
    assert all(validate_key(recipe(**other), BASE, MADE, TEXT) == key for other in others)


def test_a_changed_card_of_the_base_measures_nothing_again() -> None:
    key = validate_key(recipe(), BASE, MADE, TEXT)
    assert validate_key(recipe(), changed("README.md"), MADE, TEXT) == key
    assert {f.path for f in compared_part(BASE).files} == {"config.json", "model.safetensors"}


def test_how_answers_are_sampled_is_compared_and_measures_nothing_again() -> None:
    sampled = Manifest.of([*BASE.files, File("generation_config.json", 1, A)])
    assert validate_key(recipe(), sampled, MADE, TEXT) != validate_key(recipe(), BASE, MADE, TEXT)
    assert stage.measured_part(sampled).digest == BASE.digest


def test_a_measurement_with_the_code_of_a_checkpoint_has_a_key_of_its_own() -> None:
    plain = RunSettings(torch.device("cpu"), torch.float32)
    for kind in (stage.MEASURE, stage.NOISE):
        key = MeasurementKey(A, B, None, plain).of(kind)
        assert MeasurementKey(A, B, None, replace(plain, remote_code=True)).of(kind) != key
        assert MeasurementKey(A, B, None, plain, "bfloat16").of(kind) != key
        before = {"code": VERSION, "device": "cpu", "dtype": "torch.float32", "tokens": None}
        assert key == kind.key(reads={"checkpoint": A, "text": B}, settings=before)


def test_a_result_whose_scales_an_engine_rounds_is_measured_so_and_its_base_as_before(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    made = Checkpoint.open(write_quantized(base, tmp_path))
    plain = RunSettings(torch.device("cpu"), torch.float32)
    assert scales_rounded_to(Checkpoint.open(base), plain) is None
    assert scales_rounded_to(made, plain) == "bfloat16", "the dtype of the config, in which vLLM serves it"
    assert scales_rounded_to(made, replace(plain, served="float16")) is None, "they are float16, and stay exact"


def test_a_changed_base_artifact_or_head_is_measured() -> None:
    keys = {
        validate_key(recipe(), BASE, MADE, TEXT),
        validate_key(recipe(), changed("model.safetensors"), MADE, TEXT),
        validate_key(recipe(), changed("config.json"), MADE, TEXT),
        validate_key(recipe(), BASE, BASE, TEXT),
        validate_key(recipe(mtp="drop"), BASE, MADE, TEXT),
        validate_key(recipe(allow_remote_code=True), BASE, MADE, TEXT),
        validate_key(recipe(benchmark={"flags": {"dtype": "half"}}), BASE, MADE, TEXT),
        validate_key(recipe(), BASE, MADE, replace(TEXT, digest=B)),
    }
    assert len(keys) == 8


def test_a_text_of_many_documents_is_measured_on_as_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": word * 3, "id": 1}) + "\n" for word in ("ab", "", "cd")))
    path = text_for_measuring(open_store(), Text("rows.jsonl", A, path=rows), tmp_path / "work", TINY)
    assert path.read_text() == "ababab\n\ncdcdcd"
    plain = tmp_path / "plain.txt"
    assert text_for_measuring(open_store(), Text("plain.txt", A, path=plain), tmp_path / "work", TINY) == plain


@pytest.mark.usefixtures("quick_rendering")
def test_chats_are_measured_on_as_the_bases_template_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    path = text_for_measuring(open_store(), find_text(str(rows), "validation.text"), tmp_path / "work", TINY)
    assert path.read_text() == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"


UNREADABLE = {
    '{"words": "ab"}\n': r"the rows of rows\.jsonl have the columns words; a row needs text, messages,",
    "[1, 2]": r"rows\.jsonl cannot be read \(ValueError: a row is int",
    "{": r"rows\.jsonl cannot be read \(JSONDecodeError",
    '{"text": 5}\n': r"rows\.jsonl cannot be read \(ValueError: a row has int as text",
    "\x00": r"rows\.jsonl cannot be read \(JSONDecodeError",
    "": r"rows\.jsonl is empty",
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.items())
def test_rows_without_a_text_are_refused_with_a_sentence(
    content: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(RecipeError, match=rf"^validation\.text: {reason}"):
        text_for_measuring(open_store(), Text("rows.jsonl", A, path=tmp_path / "rows.jsonl"), tmp_path / "work", TINY)


@pytest.mark.parametrize("allowed", [True, False])
def test_tasks_and_text_are_run_with_the_code_of_a_checkpoint_only_where_the_recipe_allows_it(
    allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, files, _ = prepared(tmp_path, pico_base(tmp_path / "base"))
    text = find_text("builtin:python-evaluation")
    settings: dict[str, bool] = {}

    def evaluate_pair(recipe: Recipe, *others: Any) -> Any:
        settings["tasks"] = recipe.allow_remote_code

    def measured_values(quantized: Checkpoint, base: Checkpoint, measure: Any, evaluate: Any, **how: Any) -> Measured:
        settings["text"] = how["settings"].remote_code
        evaluate()
        return good(kl_divergence=None)

    monkeypatch.setattr(stage, "measured_values", measured_values)
    monkeypatch.setattr(stage, "evaluate_pair", evaluate_pair)
    asked = recipe(allow_remote_code=allowed, eval={"tasks": ["gsm8k"]})
    result = stage.validate(store, asked, files, files, text)
    assert settings == {"tasks": allowed, "text": allowed}
    assert stage.read_values(store, result) == good(text=text.name, kl_divergence=None)
    assert result.provenance.document["measured"] == good(kl_divergence=None).to_json()
