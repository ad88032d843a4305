"""The streaming writer, against safetensors' own reader."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as reference

from requant.tasks.checkpoint.header import DTYPE_BITS, Tensor, read_header
from requant.tasks.checkpoint.writer import index_of, split_into_shards, write_file, write_json, write_shard
from tests.factories.checkpoints import raw_tensors, safetensors_bytes

WHOLE_BYTES = [d for d, bits in DTYPE_BITS.items() if bits % 8 == 0]


def tensors_of(path: Path, raw: Any) -> list[Tensor]:
    path.write_bytes(safetensors_bytes(raw))
    return list(read_header(path).values())


def test_a_file_is_described_by_what_was_written(tmp_path: Path) -> None:
    file = write_file(tmp_path, "sub/x.bin", iter([b"ab", b"", b"cd"]))
    assert (file.path, file.size, file.sha256) == ("sub/x.bin", 4, hashlib.sha256(b"abcd").hexdigest())
    assert (tmp_path / "sub/x.bin").read_bytes() == b"abcd"
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["x.bin"]


def test_nothing_is_left_behind_after_an_exception_in_the_middle(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_file(tmp_path, "model.safetensors", pieces())
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_whole_when_writing_its_successor_fails(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path, "x", pieces())
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_shard_whose_source_is_cut_short_is_not_written(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    tensors = tensors_of(source, {"a": ("U8", (8,), b"12345678")})
    source.write_bytes(source.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"source\.safetensors ends inside a"):
        write_shard(tmp_path / "out", "x.safetensors", tensors)
    assert list((tmp_path / "out").iterdir()) == []


def test_json_keeps_its_order_and_its_characters(tmp_path: Path) -> None:
    file = write_json(tmp_path, "config.json", {"z": 1, "a": "日本", "n": None})
    assert (tmp_path / "config.json").read_text() == '{\n  "z": 1,\n  "a": "日本",\n  "n": null\n}\n'
    assert file.size == (tmp_path / "config.json").stat().st_size


def test_packed_words_after_bf16_are_aligned_to_their_size(tmp_path: Path) -> None:
    """numpy and torch view the bytes of the file: an I32 at an odd multiple of two cannot be viewed."""
    raw = {
        "a.norm": ("BF16", (3,), b"123456"),
        "b.flag": ("BOOL", (1,), b"\1"),
        "c.qweight": ("I32", (2,), b"ABCDEFGH"),
        "d.scales": ("F16", (1,), b"xy"),
        "e.step": ("I64", (1,), b"12345678"),
    }
    write_shard(tmp_path, "x.safetensors", tensors_of(tmp_path / "source", raw))
    written = read_header(tmp_path / "x.safetensors")
    assert {n: t.begin % (DTYPE_BITS[t.dtype] // 8) for n, t in written.items()} == dict.fromkeys(raw, 0)
    assert min(t.begin for t in written.values()) % 8 == 0
    assert raw_tensors(tmp_path / "x.safetensors") == raw


def test_a_shard_is_read_by_numpy_as_the_arrays_it_was_made_of(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "f16": random.normal(size=(3, 5)).astype(np.float16),
        "words": random.integers(-(2**31), 2**31, (4, 4), dtype=np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5),
        "ünïcode.weight": np.arange(7, dtype=np.uint8),
    }
    reference.save_file(arrays, tmp_path / "source.safetensors")
    write_shard(tmp_path, "copy.safetensors", list(read_header(tmp_path / "source.safetensors").values()))
    copy = reference.load_file(tmp_path / "copy.safetensors")
    assert set(copy) == set(arrays)
    for name, array in arrays.items():
        assert copy[name].dtype == array.dtype and copy[name].shape == array.shape
        assert np.array_equal(copy[name], array)


def test_a_shard_says_that_it_is_pytorchs(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_shard(tmp_path, "x.safetensors", tensors_of(tmp_path / "source", {"a": ("U8", (1,), b"x")}))
    with safe_open(tmp_path / "x.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


names = st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__" and n.encode("utf-8", "ignore"))


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name in draw(st.lists(names, unique=True, max_size=6)):
        dtype = draw(st.sampled_from(WHOLE_BYTES))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        size = int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
        found[name] = (dtype, shape, draw(st.binary(min_size=size, max_size=size)))
    return found


@given(raw=checkpoints())
def test_any_tensors_come_back_from_the_reference_reader_as_they_went_in(raw: Any, tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path / "source", raw)
    file = write_shard(tmp_path, "copy.safetensors", tensors)
    data = (tmp_path / "copy.safetensors").read_bytes()
    assert raw_tensors(tmp_path / "copy.safetensors") == raw
    assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert data == (tmp_path / write_shard(tmp_path, "again.safetensors", tensors).path).read_bytes()


@given(sizes=st.lists(st.integers(0, 30), max_size=20), limit=st.integers(1, 40))
def test_shards_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    tensors = [Tensor(f"t{i}", "U8", (n,), Path("x"), 0, n) for i, n in enumerate(sizes)]
    layout = split_into_shards(tensors, limit)
    assert [t for shard in layout.values() for t in shard] == tensors
    assert list(layout) == [f"model-{i:05d}-of-{len(layout):05d}.safetensors" for i in range(1, len(layout) + 1)]
    for shard in layout.values():
        assert sum(t.nbytes for t in shard) <= limit or len(shard) == 1
    shards = list(layout.values())
    for shard, following in itertools.pairwise(shards):
        assert sum(t.nbytes for t in shard) + following[0].nbytes > limit


def test_a_single_shard_is_never_named_as_loaders_prefer_it() -> None:
    tensor = Tensor("a", "U8", (1,), Path("x"), 0, 1)
    assert list(split_into_shards([tensor])) == ["model-00001-of-00001.safetensors"]


def test_an_index_names_every_tensor_and_counts_data_bytes_only(tmp_path: Path) -> None:
    raw = {"b": ("F32", (2,), b"12345678"), "a": ("U8", (3,), b"abc"), "c": ("BF16", (1,), b"xy")}
    layout = split_into_shards(tensors_of(tmp_path / "source", raw), max_bytes=11)
    index = index_of(layout)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 13}, "weight_map": {"a": first, "b": first, "c": second}}
    assert list(index["weight_map"]) == ["a", "b", "c"]
    assert json.loads(json.dumps(index)) == index
