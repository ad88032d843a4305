"""Checkpoint.open: what index, files and headers say about each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.checkpoint.checkpoint import INDEX, MAX_JSON, SINGLE, Checkpoint, read_json
from tasks.errors import CheckpointError
from tests.pico import pico_base
from tests.unit.making import all_tensors, write_checkpoint

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {"num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of two tensors."""
    first = {"a": ("U8", (4,), b"abcd"), "b": ("BF16", (2,), b"1234")}
    second = {"c": ("F32", (1,), b"ABCD"), "d": ("I64", (1,), b"12345678")}
    return write_checkpoint(tmp_path / "checkpoint", {ONE: first, TWO: second}, CONFIG)


def edit_index(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**document, **changes}))


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def test_a_sharded_checkpoint_is_read_whole(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.problems == []
    assert checkpoint.shards == (ONE, TWO)
    assert {n: t.read() for n, t in checkpoint.tensors.items()} == {
        "a": b"abcd", "b": b"1234", "c": b"ABCD", "d": b"12345678",
    }  # fmt: skip
    assert checkpoint.nbytes == checkpoint.total_size == 20
    assert checkpoint.config == CONFIG == checkpoint.text_config
    assert checkpoint.sound() is checkpoint


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {SINGLE: {"a": ("U8", (1,), b"x")}}, {}, index=False)
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.problems, checkpoint.shards, checkpoint.total_size) == ([], (SINGLE,), None)


def test_a_pico_base_is_sound_and_read_as_the_reference_reader_reads_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico_base(tmp_path / "base")).sound()
    theirs = all_tensors(tmp_path / "base")
    assert {n: (t.dtype, t.shape, t.read()) for n, t in checkpoint.tensors.items()} == theirs
    assert checkpoint.head is not None and checkpoint.text_config["model_type"] == "qwen3_5_text"


def test_a_missing_shard_is_a_problem_that_stops_work(folder: Path) -> None:
    (folder / TWO).unlink()
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.problems == [f"the index names {TWO}, which is missing"]
    with pytest.raises(CheckpointError, match=f"names {TWO}, which is missing"):
        checkpoint.sound()


def test_a_tensor_that_the_index_lacks_is_a_problem(folder: Path) -> None:
    names = weight_map(folder)
    del names["b"]
    edit_index(folder, weight_map=names)
    assert Checkpoint.open(folder).problems == [f"b is in {ONE} but not in the index"]


def test_a_tensor_that_no_shard_has_is_a_problem(folder: Path) -> None:
    edit_index(folder, weight_map={**weight_map(folder), "e": TWO})
    assert Checkpoint.open(folder).problems == [f"the index names e, which is not in {TWO}"]


def test_a_tensor_in_another_shard_than_the_index_says_is_a_problem(folder: Path) -> None:
    edit_index(folder, weight_map={**weight_map(folder), "a": TWO})
    problems = Checkpoint.open(folder).problems
    assert f"a is in {ONE}, but the index says {TWO}" in problems


def test_the_same_tensor_in_two_shards_is_a_problem(folder: Path) -> None:
    write_checkpoint(folder, {TWO: {"a": ("U8", (1,), b"x")}}, CONFIG)
    edit_index(folder, weight_map={"a": ONE, "b": ONE, "c": TWO})
    assert f"a is in {TWO}, but the index says {ONE}" in Checkpoint.open(folder).problems


def test_a_single_file_beside_an_index_is_a_problem(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / ONE).read_bytes())
    with pytest.raises(CheckpointError, match="loaders prefer it"):
        Checkpoint.open(folder).sound()


@pytest.mark.parametrize("stated", [0, 19, 21])
def test_a_wrong_total_size_is_a_problem_that_does_not_stop_work(folder: Path, stated: int) -> None:
    edit_index(folder, metadata={"total_size": stated})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.problems == [f"the index says total_size {stated}, the tensors have 20 bytes"]
    assert checkpoint.sound() is checkpoint


def test_the_first_of_several_problems_is_told_with_their_number(folder: Path) -> None:
    (folder / ONE).unlink()
    (folder / TWO).unlink()
    with pytest.raises(CheckpointError, match=rf"{ONE}, which is missing \(and 1 more"):
        Checkpoint.open(folder).sound()


@pytest.mark.parametrize("metadata", [None, 5, [], {}, {"total_size": None}, {"total_size": "20"}], ids=repr)
def test_an_index_without_a_total_size_is_read(folder: Path, metadata: Any) -> None:
    edit_index(folder, metadata=metadata)
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.total_size, checkpoint.problems) == (None, [])


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1e999"])
def test_a_total_size_that_is_no_number_is_a_checkpoint_error_or_ignored(folder: Path, number: str) -> None:
    text = (folder / INDEX).read_text().replace('"total_size": 20', f'"total_size": {number}')
    (folder / INDEX).write_text(text)
    try:
        assert Checkpoint.open(folder).tensors["a"].read() == b"abcd"
    except CheckpointError as error:
        assert INDEX in str(error)


@pytest.mark.parametrize("names", [None, [], "a", 5], ids=repr)
def test_an_index_without_a_weight_map_is_an_error(folder: Path, names: Any) -> None:
    edit_index(folder, weight_map=names)
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "pytorch_model.bin", "", 5, None, ["a"], {}])
def test_a_shard_outside_the_folder_or_of_another_format_is_refused(folder: Path, shard: Any) -> None:
    edit_index(folder, weight_map={**weight_map(folder), "a": shard})
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 9, b"[" * 200_000, b'{"a": ' + b"9" * 9999 + b"}"],
    ids=range(8),
)  # fmt: skip
def test_a_damaged_json_file_is_an_error_that_names_it(folder: Path, name: str, text: bytes) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(folder)


def test_a_json_file_of_a_gigabyte_is_refused_unread(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as stream:
        stream.truncate(MAX_JSON + 1)
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        read_json(folder / "config.json")


def test_a_folder_without_weights_config_or_anything_is_an_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text("{}")
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match="only safetensors checkpoints"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("count", ["two", [1], {"a": 1}, -1, 1.5, True, None, "1"], ids=repr)
def test_a_config_that_counts_its_heads_in_nonsense_raises_nothing_but_a_checkpoint_error(
    folder: Path, count: Any
) -> None:
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": count}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        assert Checkpoint.open(folder).head is None
    except CheckpointError as error:
        assert "num_nextn_predict_layers" in str(error)


def test_a_part_of_a_checkpoint_can_be_opened_without_its_other_shards(folder: Path) -> None:
    (folder / ONE).unlink()
    part = Checkpoint.open_shards(folder, [TWO])
    assert {n: t.read() for n, t in part.tensors.items()} == {"c": b"ABCD", "d": b"12345678"}
