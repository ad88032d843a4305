"""Folders that hold something else than a checkpoint: each is named as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.other_kinds import explain_other_kind, stated_base
from requant.tasks.errors import CheckpointError
from tests.factories.foreign import KINDS
from tests.factories.pico import pico_base
from tests.factories.watching import is_one_sentence


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_named_as_what_it_is(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(KINDS[kind].write(tmp_path / "folder"))
    told = str(caught.value)
    assert told.startswith(f"{tmp_path}/folder ") and KINDS[kind].said in told and is_one_sentence(told)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_may_have_all_of_it_beside_its_weights(kind: str, tmp_path: Path) -> None:
    paths = ["model.safetensors", *KINDS[kind].files]
    assert explain_other_kind("x", paths, lambda path: KINDS[kind].files[path]) is None
    base = pico_base(tmp_path / "base")
    for path in KINDS[kind].files.keys() - {"config.json", "tokenizer.json"}:
        (base / path).parent.mkdir(exist_ok=True)
        (base / path).write_bytes(b"1")
    assert not Checkpoint.open(base).fatal


def test_nothing_but_small_descriptions_is_read() -> None:
    for kind in KINDS.values():
        read: list[str] = []

        def reading(path: str, files: dict[str, bytes] = kind.files, read: list[str] = read) -> bytes:
            read.append(path)
            return files[path]

        explain_other_kind("x", list(kind.files), reading)
        assert {*read} <= {"README.md", "adapter_config.json", "model_index.json"}


HOSTILE = {
    "no JSON": b"{",
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "lines": b'{"peft_type": "a\\nb", "base_model_name_or_path": "x\\u001b[2J"}',
    "long": b'{"base_model_name_or_path": "%s"}' % (b"x" * 60_000),
    "another type": b'{"peft_type": ["LORA"], "base_model_name_or_path": {"a": 1}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_strangers_settings_stay_within_one_sentence(case: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError, match="is an adapter") as caught:
        Checkpoint.open(tmp_path)
    assert is_one_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: a/b\n---\n", "a/b"),
        ("---\r\nbase_model:\r\n- a/b\r\n- c/d\r\n---\r\n", "a/b"),
        ("---\nlicense: mit\nbase_model:\n  - 'a/b-1.5_x'\n---\n", "a/b-1.5_x"),
        ("---\nbase_model: [a/b]\n---\n", None),
        ("---\nbase_model: see below\n---\n", None),
        ("---\nbase_model: a/b/c\n---\n", None),
        ("---\nlicense: mit\n---\nbase_model: a/b\n", None),
        ("base_model: a/b\n", None),
    ],
)
def test_the_original_is_what_the_cards_front_matter_says(card: str, base: str | None) -> None:
    assert stated_base(card.encode()) == base


def test_a_folder_of_many_files_is_not_walked_to_its_end(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has no weights"):
        Checkpoint.open(tmp_path)


def test_of_several_checkpoints_below_each_is_named_and_a_folder_is_no_repo(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        pico_base(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).endswith("has checkpoints in 3 folders, and none at its top: name one of a, b, c")
    paths = [f"{n}/model.safetensors" for n in range(9)]
    told = explain_other_kind("x/y", paths, lambda path: b"") or ""
    assert "name one of 0, 1, 2, 3 and 5 more, or put it into a repo of its own" in told
