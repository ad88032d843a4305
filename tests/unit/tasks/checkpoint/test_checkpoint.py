"""Checkpoint.open: what index, files and headers say about each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.advice import FIX_INDEX
from requant.tasks.checkpoint.checkpoint import INDEX, SINGLE, WRONG_TOTAL, Checkpoint, read_json
from requant.tasks.checkpoint.shards import STALE
from requant.tasks.checkpoint.untrusted import MAX_JSON_BYTES
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import all_tensors, safetensors_bytes, write_checkpoint
from tests.factories.pico import pico_base

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
    assert checkpoint.problems == [f"the index names {TWO}, which is missing: download it again"]
    with pytest.raises(CheckpointError, match=f"names {TWO}, which is missing"):
        checkpoint.sound()


def test_a_tensor_that_the_index_lacks_is_a_problem(folder: Path) -> None:
    names = weight_map(folder)
    del names["b"]
    edit_index(folder, weight_map=names)
    assert Checkpoint.open(folder).problems == [
        f"b is in {ONE} but not in the index",
        f"the index is wrong, and the shards have every tensor that it names: {FIX_INDEX}",
    ]


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


def test_a_part_of_the_tensors_in_a_single_file_beside_an_index_may_be_loaded_alone(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / ONE).read_bytes())
    assert Checkpoint.open(folder).fatal == []
    with pytest.raises(CheckpointError, match="transformers reads it alone, and misses c: move it out"):
        Checkpoint.open(folder).sound()


@pytest.mark.parametrize("stated", [0, 19, 21])
def test_a_wrong_total_size_is_a_problem_that_does_not_stop_work(folder: Path, stated: int) -> None:
    edit_index(folder, metadata={"total_size": stated})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.problems == [
        f"the index says total_size {stated}, the tensors have 20 bytes: run requant mtp-fix"
    ]
    assert checkpoint.sound() is checkpoint


def test_the_first_of_several_problems_is_told_with_their_number(folder: Path) -> None:
    (folder / ONE).unlink()
    (folder / TWO).unlink()
    with pytest.raises(CheckpointError, match=rf"{ONE}, which is missing: .* \(and 1 more"):
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


OUTSIDE = [
    "../x.safetensors", "/x.safetensors", "sub/../../x.safetensors", "./x.safetensors", "..", ".", "x\0.safetensors",
    "..\\x.safetensors", "x\n.safetensors", "\x1b[2J.safetensors", "\u202e.safetensors", "\ud800.safetensors",
    "a" * 2000 + ".safetensors", "pytorch_model.bin", "config.json", "", 5, 1.5, True, None, ["a"], {},
]  # fmt: skip


@pytest.mark.parametrize("shard", OUTSIDE, ids=ascii)
def test_a_shard_outside_the_folder_or_of_another_format_is_a_problem_and_never_opened(
    folder: Path, shard: Any
) -> None:
    (folder.parent / "x.safetensors").write_bytes(safetensors_bytes({"a": ("U8", (4,), b"evil")}))
    edit_index(folder, weight_map={**weight_map(folder), "a": shard})
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        assert "surrogates not allowed" in str(error)
        return
    assert checkpoint.shards == (ONE, TWO) and "a" not in checkpoint.tensors
    assert all(problem.isprintable() and len(problem) < 600 for problem in checkpoint.problems)
    with pytest.raises(CheckpointError, match="the index names"):
        checkpoint.sound()


def test_a_shard_in_a_folder_below_is_read(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / ONE).rename(folder / "sub" / ONE)
    edit_index(folder, weight_map={"a": f"sub/{ONE}", "b": f"sub/{ONE}", "c": TWO, "d": TWO})
    assert Checkpoint.open(folder).sound().tensors["a"].read() == b"abcd"


def test_what_lies_at_a_shards_name_and_is_no_file_is_a_problem(folder: Path) -> None:
    for make in NO_FILES:
        (folder / TWO).unlink(missing_ok=True)
        make(folder / TWO)
        checkpoint = Checkpoint.open(folder)
        assert list(checkpoint.tensors) == ["a", "b"] and len(checkpoint.fatal) == 1
        (folder / TWO).rmdir() if make is Path.mkdir else None


def test_what_lies_at_a_json_files_name_and_is_no_file_is_an_error_that_names_it(folder: Path) -> None:
    for name in ("config.json", INDEX):
        whole = (folder / name).read_bytes()
        for make in NO_FILES:
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
            with pytest.raises(CheckpointError, match=name):
                Checkpoint.open(folder)
            (folder / name).rmdir() if make is Path.mkdir else None
        (folder / name).unlink()
        (folder / name).write_bytes(whole)


NO_FILES: list[Callable[[Path], None]] = [
    Path.mkdir,
    os.mkfifo,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/dev/stdin"),
    lambda path: path.symlink_to("/proc/self/mem"),  # a regular file without a size
    lambda path: path.symlink_to("/proc/kmsg"),  # one that waits
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("config.json/x"),
    lambda path: path.symlink_to("x" * 255 + "/" + "x" * 255),
    lambda path: path.symlink_to(".."),
    lambda path: path.write_bytes(b""),
]


def test_a_link_to_a_shard_elsewhere_is_followed_as_in_the_hubs_cache(folder: Path) -> None:
    (folder.parent / "blobs").mkdir()
    (folder / ONE).rename(folder.parent / "blobs" / "1")
    (folder / ONE).symlink_to("../blobs/1")
    assert Checkpoint.open(folder).sound().tensors["a"].read() == b"abcd"


def test_a_shard_that_the_index_does_not_name_is_a_problem_that_does_not_stop_work(folder: Path) -> None:
    (folder / "old.safetensors").write_bytes(b"never opened")
    (folder / "consolidated.safetensors").write_bytes(b"Mistral's own")
    checkpoint = Checkpoint.open(folder).sound()
    assert len(checkpoint.problems) == 1 and checkpoint.problems[0].startswith("old.safetensors is a shard")


def test_a_broken_header_is_a_problem_and_the_other_shards_are_read(folder: Path) -> None:
    (folder / ONE).write_bytes(b"\xff" * 100)
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.tensors) == ["c", "d"]
    assert len(checkpoint.fatal) == 1 and ONE in checkpoint.fatal[0]


@pytest.mark.parametrize("name", [STALE, f"x {STALE}", WRONG_TOTAL])
def test_a_tensors_name_cannot_make_a_problem_look_harmless(folder: Path, name: str) -> None:
    (folder / ONE).write_bytes(safetensors_bytes({"a": ("U8", (4,), b"abcd"), name: ("BF16", (2,), b"1234")}))
    edit_index(folder, weight_map={"a": ONE, "c": TWO, "d": TWO})
    with pytest.raises(CheckpointError, match="not in the index"):
        Checkpoint.open(folder).sound()


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_key_that_stands_twice_is_a_problem_that_stops_work_and_no_reader(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("}", ', "x": 1, "x": 2}', 1) if name != INDEX else twice(text))
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.problems) == 1 and checkpoint.fatal == [] and "twice" in checkpoint.problems[0]
    assert set(checkpoint.tensors) == {"a", "b", "c", "d"}
    with pytest.raises(CheckpointError, match=f"{name} says . twice"):
        checkpoint.sound()


def twice(index: str) -> str:
    return index.replace('"a":', '"a": "evil.safetensors", "a":')


def test_a_hundred_problems_of_a_kind_are_told_and_the_rest_is_counted(folder: Path) -> None:
    names = {f"n{i}": TWO for i in range(150)} | {f"m{i}": f"{i}.safetensors" for i in range(250)}
    edit_index(folder, weight_map={**weight_map(folder), **names})
    problems = Checkpoint.open(folder).problems
    assert len(problems) == 202
    assert [p.split(":")[0] for p in problems if "more" in p] == [
        "150 more problems are like this", "50 more problems are like this",
    ]  # fmt: skip


def test_names_that_would_move_the_cursor_are_escaped_and_cut_in_problems(folder: Path) -> None:
    names = ["\x1b[2J\x1b[31mred", "two\nlines", "\0", "\u202eright to left", "\x9b31m", "n" * 100_000]
    (folder / ONE).write_bytes(safetensors_bytes(dict.fromkeys(names, ("U8", (0,), b""))))
    edit_index(folder, weight_map={**dict.fromkeys((n + "!" for n in names), ONE), "c": TWO, "d": TWO})
    problems = Checkpoint.open(folder).problems
    assert len(problems) == 12
    assert all(problem.isprintable() and len(problem) < 600 for problem in problems)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 9, b"[" * 200_000, b'{"a": ' + b"9" * 9999 + b"}",
     b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", b'{"a": "\\ud800"}', b'{"\xed\xa0\x80": 1}', b"\xef\xbb\xbf{}",
     "{}".encode("utf-16"), b"{}{}", b"{'a': 1}", b'{"a": 1,}', b'{"a": "\n"}'],
    ids=range(17),
)  # fmt: skip
def test_a_damaged_json_file_is_an_error_that_names_it(folder: Path, name: str, text: bytes) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(folder)


def test_a_json_file_of_a_gigabyte_is_refused_unread(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        read_json(folder / "config.json")


def test_a_folder_without_weights_config_or_anything_is_an_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text("{}")
    for path in (folder / INDEX, *folder.glob("*.safetensors")):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
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


def test_a_folder_below_that_leads_outside_is_not_followed(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / ONE).rename(outside / ONE)
    (folder / "sub").symlink_to(outside)
    edit_index(folder, weight_map={"a": f"sub/{ONE}", "b": f"sub/{ONE}", "c": TWO, "d": TWO})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shards == (TWO,) and list(checkpoint.tensors) == ["c", "d"]
    with pytest.raises(CheckpointError, match=f"names sub/{ONE}, no file of this folder"):
        checkpoint.sound()
