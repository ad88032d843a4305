"""The small files beside the weights: what is said of one that engines could not read."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import pytest

from requant.tasks.checkpoint.companions import (
    VOCABULARIES,
    companion_problems,
    has_vocabulary,
    is_companion,
    may_be_pointer,
)
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from tests.factories.foreign import IN_PLACE, POINTER
from tests.factories.pico import pico_base
from tests.factories.watching import is_one_sentence

NAMES = [
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "qwen.tiktoken",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "tekken.json",
]  # fmt: skip


@pytest.mark.parametrize("case", IN_PLACE)
def test_each_of_them_is_named_if_it_is_something_else(case: str, tmp_path: Path) -> None:
    content, said = IN_PLACE[case]
    for name in NAMES:
        (tmp_path / name).write_bytes(content)
        (problem,) = companion_problems(tmp_path)
        assert problem.startswith(f"{name} {said}") and is_one_sentence(problem)
        (tmp_path / name).unlink()


def test_every_vocabulary_is_fetched_before_a_text_is_read() -> None:
    """The code of a tokenizer is fetched with the other code, if the recipe allows it."""
    names = ["tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "qwen.tiktoken", "tekken.json"]
    assert has_vocabulary(names) and all(is_companion(name) for name in names)
    assert all(any(fnmatch.fnmatchcase(n, p) for n in [*names, "tokenization_x.py"]) for p in VOCABULARIES)


def test_a_pointer_in_place_of_the_tokenizer_is_a_problem_of_the_checkpoint(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    assert inspect_checkpoint(base).problems == []
    (base / "tokenizer.json").write_bytes(POINTER)
    (problem,) = inspect_checkpoint(base).problems
    assert problem.startswith("tokenizer.json is a Git LFS pointer")


@pytest.mark.parametrize("entries", [10, 10_000])
def test_json_that_is_cut_off_is_told_whatever_its_size(entries: int, tmp_path: Path) -> None:
    whole = json.dumps({str(number): number for number in range(entries)})
    (tmp_path / "tokenizer.json").write_text(whole)
    assert [*companion_problems(tmp_path)] == []
    (tmp_path / "tokenizer.json").write_text(whole[:-5])
    (problem,) = companion_problems(tmp_path)
    assert problem.startswith("tokenizer.json ") and problem.endswith("download it again")


def test_a_link_to_nothing_is_told_and_folders_and_other_files_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "notes.json").write_text("{")
    (tmp_path / "vocab.json").symlink_to(tmp_path / "blobs" / "nowhere")
    (problem,) = companion_problems(tmp_path)
    assert problem == "vocab.json is a link to a file that is missing: fetch the file"


def test_a_file_that_a_sparse_checkout_has_not_fetched_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bytes(100_000))
    assert [*companion_problems(tmp_path)] == []


def test_only_files_of_a_pointers_size_are_looked_into_on_the_hub() -> None:
    assert all(may_be_pointer(name, len(POINTER)) for name in NAMES)
    assert not may_be_pointer("tokenizer.json", 12_807_982) and not may_be_pointer("README.md", len(POINTER))


@pytest.mark.parametrize(
    "paths", [["tokenizer.json"], ["vocab.json", "merges.txt"], ["spiece.model"], ["tekken.json"], ["vocab.txt"]]
)
def test_a_vocabulary_makes_a_tokenizer(paths: list[str]) -> None:
    assert has_vocabulary(paths)
    assert not has_vocabulary(["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "model.py"])
