"""The files of a data set's configurations and splits, by its card and by the names of files and folders."""

from __future__ import annotations

import pytest

from requant.tasks.texts.data_files import by_split, choose_files, matches, read_card

SHARDS = ["data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
SPLITS = [
    (SHARDS, {"test": SHARDS[:1], "train": SHARDS[1:]}),
    (["data/train_sft-00000-of-00001.parquet"], {"train_sft": ["data/train_sft-00000-of-00001.parquet"]}),
    (["train/a.jsonl", "valid/b.jsonl"], {"train": ["train/a.jsonl"], "validation": ["valid/b.jsonl"]}),
    (["en-train.jsonl", "en_dev.jsonl"], {"train": ["en-train.jsonl"], "validation": ["en_dev.jsonl"]}),
    (["a.jsonl", "trained.jsonl"], {"train": ["a.jsonl", "trained.jsonl"]}),
    (["my.test.jsonl.gz", "other.jsonl.gz"], {"test": ["my.test.jsonl.gz"]}),
]


@pytest.mark.parametrize(("paths", "splits"), SPLITS)
def test_splits_are_told_by_names_of_shards_folders_and_files(paths: list[str], splits: dict[str, list[str]]) -> None:
    assert by_split(paths) == splits


CARD = """---
license: [cc0-1.0]
configs:
- config_name: small
  data_files: small/*.jsonl
- config_name: large
  default: true
  data_files:
  - {split: train, path: [large/a*.jsonl, ./large/more/**]}
  - {split: test, path: large/t.jsonl}
- config_name: folder
  data_dir: other
- 5
---
Text
"""
FILES = [
    "large/a1.jsonl",
    "large/more/x/y.jsonl",
    "large/t.jsonl",
    "other/train.txt",
    "other/test.txt",
    "small/s.jsonl",
]
CHOICES = [
    ([], FILES[:2]), (["large"], FILES[:2]), (["test"], FILES[2:3]), (["", "test"], FILES[2:3]),
    (["large", "train"], FILES[:2]), (["folder"], FILES[3:4]), (["folder", "test"], FILES[4:5]), (["small"], FILES[5:]),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "files"), CHOICES, ids=str)
def test_a_card_names_configurations_and_splits(wanted: list[str], files: list[str]) -> None:
    card = read_card(CARD)
    assert card.license == "cc0-1.0" and [config.name for config in card.configs] == ["small", "large", "folder"]
    assert choose_files(FILES, card, wanted) == files


def test_patterns_match_below_the_folder_that_a_configuration_names() -> None:
    card = read_card("---\nconfigs:\n- {config_name: a, data_dir: ./large, data_files: 'a*.jsonl'}\n---\n")
    assert choose_files([*FILES, "a9.jsonl"], card, []) == FILES[:1]


def test_without_a_card_a_folder_is_a_configuration_and_train_is_read_of_several_splits() -> None:
    card = read_card("no front matter")
    assert choose_files(SHARDS, card, []) == SHARDS[1:] == choose_files(SHARDS, card, ["data", "train"])
    assert choose_files(SHARDS, card, ["test"]) == SHARDS[:1]
    assert choose_files(["a/x.txt", "b/x.txt"], card, ["b"]) == ["b/x.txt"]
    assert choose_files(["x.dev.txt", "x.test.txt"], card, []) == ["x.dev.txt", "x.test.txt"]


TOLD = {
    "has no medium: its configurations are small, large, folder, and its splits are train, test": ["medium"],
    "has no configuration medium: its configurations are small, large, folder": ["medium", "train"],
    "has no dev: its splits are train, test": ["large", "dev"],
}


@pytest.mark.parametrize("told", TOLD)
def test_a_choice_that_does_not_exist_is_told_with_those_that_do(told: str) -> None:
    with pytest.raises(ValueError) as caught:
        choose_files(FILES, read_card(CARD), TOLD[told])
    assert str(caught.value) == told


def test_several_configurations_without_a_default_ask_for_one() -> None:
    card = read_card("---\nconfigs:\n- {config_name: a, data_files: x}\n- {config_name: b, data_files: y}\n---\n")
    with pytest.raises(ValueError, match="has no default configuration: add :NAME to it; its configurations are a, b"):
        choose_files(["x", "y"], card, [])
    assert choose_files(["x", "y"], card, ["b"]) == ["y"]


@pytest.mark.parametrize(
    "text", ["", "---\n- 1\n---", "---\n{\n---", "---\nconfigs: 5\nlicense: {}\n---", "---\n\0\n---"]
)
def test_a_card_of_another_form_says_nothing(text: str) -> None:
    assert read_card(text).license is None and read_card(text).configs == ()


MATCHES = {
    ("a/b.txt", "a/*.txt"): True, ("a/b/c.txt", "a/*.txt"): False, ("a/b/c.txt", "a/**"): True, ("a", "a/**"): False,
    ("a/b/c.txt", "**/c.txt"): True, ("c.txt", "**/c.txt"): True, ("a/b1.txt", "a/b[0-9].txt"): True,
    ("/".join("a" * 200), "/".join(["**", "a"] * 100)): True, ("/".join("a" * 200), "/".join(["**", "b"] * 100)): False,
}  # fmt: skip


@pytest.mark.parametrize(("names", "fits"), MATCHES.items())
def test_patterns_match_as_globs_do(names: tuple[str, str], fits: bool) -> None:
    assert matches(*names) == fits
