"""The stage self_calibration: one text for all outputs and revisions of the same weights, read as it was written."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from requant.tasks.artifact import File, Manifest
from requant.tasks.quantizing.samples import SampleSource, calibration_samples
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.self_calibration import STAGE, TEXT_FILE, self_calibration, self_calibration_key
from requant.tasks.store import Store
from requant.tasks.store.resume import upload_resume
from requant.tasks.texts.calibration import find_calibration
from requant.tasks.texts.documents import read_documents
from requant.tasks.validating.model import load_tokenizer
from requant.tasks.writing import write
from requant.tasks.writing.amount import needed_tokens, own_samples
from requant.tasks.writing.rows import batch_files
from tests.factories.paths import TINY
from tests.factories.pico import pico_base
from tests.factories.stores import held_base

A, B = "a" * 64, "b" * 64
FILES = (
    "README.md", ".gitattributes", "preprocessor_config.json", "config.json", "generation_config.json",
    "chat_template.jinja", "tokenizer.json", "model.safetensors", "modeling_x.py",
)  # fmt: skip
BASE = Manifest.of(File(path, 3, A) for path in FILES)
SMALL = {"calibration": "self", "nsamples": 4, "seqlen": 64, "batch_size": 4, "group_size": 32}


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {**SMALL, **changes.pop("quantize", {})}, **changes})


def key(asked: Recipe, base: Manifest = BASE) -> str:
    return self_calibration_key(asked, base)


def held(store: Store, folder: Path) -> Manifest:
    """A pico base in a store."""
    files = held_base(store, pico_base(folder)).files
    return Manifest.of(File(file.path, file.size, str(file.sha256)) for file in files)


@pytest.mark.parametrize("path", FILES)
def test_the_text_depends_on_weights_tokenizer_and_template_alone(path: str) -> None:
    changed = Manifest.of(replace(file, sha256=B) if file.path == path else file for file in BASE.files)
    depends = path not in {"README.md", ".gitattributes", "preprocessor_config.json"}
    assert (key(recipe(), changed) != key(recipe())) == depends


def test_what_it_is_quantized_to_changes_nothing_and_the_seed_and_the_amount_do() -> None:
    scheme = {"scheme": "W8A16", "iters": 7, "batch_size": 2}
    assert key(recipe(quantize=scheme, mtp="int8", benchmark={"engine": "none"})) == key(recipe())
    for changed in ({"seed": 1}, {"nsamples": 5}, {"seqlen": 128}):
        assert key(recipe(quantize=changed)) != key(recipe())


def test_all_outputs_share_a_text_that_is_long_enough_for_each() -> None:
    outputs = [{"scheme": "W4A16", "nsamples": 16}, {"scheme": "W8A16", "seqlen": 128}]
    assert needed_tokens(recipe(outputs=outputs)) == 16 * 64 * 5 // 4
    assert key(recipe(outputs=outputs)) != key(recipe())


def test_what_the_samples_of_each_output_need_is_part_of_the_key() -> None:
    """Both ask for as many tokens, and for rows as long; the samples of one of them can need more text."""
    longest = {"scheme": "W4A16", "nsamples": 8, "seqlen": 128}
    few, many = ([longest, {"scheme": "W8A16", "nsamples": count}] for count in (4, 16))
    assert needed_tokens(recipe(outputs=few)) == needed_tokens(recipe(outputs=many))
    assert key(recipe(outputs=few)) != key(recipe(outputs=many))


def test_of_several_sources_it_writes_its_share() -> None:
    weighted = [{"source": "builtin:python", "weight": 3}, {"source": "self", "weight": 1}]
    assert own_samples(recipe(quantize={"calibration": weighted, "nsamples": 16}).quantize) == 4
    filling_up = ["builtin:python", "self"]
    assert own_samples(recipe(quantize={"calibration": filling_up, "nsamples": 16}).quantize) == 16


@pytest.mark.usefixtures("quick_rendering")
def test_calibration_gets_exactly_the_tokens_that_the_base_read_and_wrote(store: Store, tmp_path: Path) -> None:
    shares: list[float] = []
    base = held(store, tmp_path / "base")
    result = self_calibration(store, recipe(), base, shares.append)
    assert (result.state, shares[-1]) == ("ran", 1.0)
    folder = store.link_files(result.manifest, tmp_path / "text")
    documents = list(read_documents(folder / TEXT_FILE))
    assert len({document.domain for document in documents}) >= 5
    tokenizer = load_tokenizer(TINY)
    for document in documents:
        assert document.text == tokenizer.decode(document.ids) and document.chat and len(document.ids) <= 64
        assert document.tokens == (len(document.ids),) and "<|im_start|>assistant\n" in document.text
    assert any(tokenizer(d.text, add_special_tokens=False)["input_ids"] != list(d.ids) for d in documents)
    (found,) = find_calibration(recipe().quantize).with_written(result.manifest).sources
    source = SampleSource(
        name=found.text.label, paths=[folder / TEXT_FILE], rendered=True, mixed=found.text.mixed, max_tokens=None
    )
    samples, (use,) = calibration_samples(tokenizer, [source], nsamples=4, seqlen=64)
    written = {tuple(document.ids[:8]) for document in documents}
    assert all(tuple(sample[0, :8].tolist()) in written for sample in samples), "each begins with a prompt"
    assert sum(use.samples.values()) == 4 and use.rows == len(documents)
    told = result.provenance.document
    assert told["tokens"] == dict(_tokens_by_domain(documents)) and told["experts"] is None
    assert told["engines"] == {f"transformers {transformers.__version__}": told["rows"]}
    assert result.provenance.written_tokens >= 4 * 64
    again = self_calibration(store, recipe(quantize={"scheme": "W8A16"}), base)
    assert (again.state, again.manifest) == ("reused", result.manifest)


def _tokens_by_domain(documents: list[Any]) -> Counter[str]:
    tokens = Counter[str]()
    for document in documents:
        tokens[document.domain] += len(document.ids)
    return tokens


@pytest.mark.usefixtures("quick_rendering")
def test_another_machine_goes_on_after_the_batches_in_the_store(
    far: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("requant.tasks.writing.schedule.MAX_BATCH", 3)
    base = held(far, tmp_path / "base")
    whole = self_calibration(far, recipe(), base)
    assert not list(far.backend.keys(f"resume/{STAGE.name}"))
    far.backend.delete(f"artifacts/{STAGE.name}/{whole.key}")
    write_batch, numbers = write.write_batch, list[int]()

    def killed(folder: Path, number: int, rows: Any) -> None:
        numbers.append(number)
        if number == 1:
            upload_resume(far, STAGE.name, whole.key, folder, batch_files(folder), {})
            raise KeyboardInterrupt
        write_batch(folder, number, rows)

    monkeypatch.setattr(write, "write_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        self_calibration(far, recipe(), base)
    assert numbers == [0, 1]
    other = Store(far.backend, cache=type(far.cache)(tmp_path / "other"))
    other.check()
    numbers.clear()
    monkeypatch.setattr(write, "write_batch", lambda folder, n, rows: (numbers.append(n), write_batch(folder, n, rows)))
    resumed = self_calibration(other, recipe(), base)
    assert numbers[0] == 1 and resumed.manifest == whole.manifest
    assert json.dumps(resumed.provenance.document["tokens"]) == json.dumps(whole.provenance.document["tokens"])


@pytest.fixture(autouse=True)
def _without_vllm_and_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("REQUANT_VLLM", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
