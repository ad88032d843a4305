"""read_header against everything that a file from the Internet may hold."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from requant.tasks.checkpoint.header import DTYPE_BITS, read_header
from requant.tasks.checkpoint.untrusted import MAX_HEADER_BYTES
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import safetensors_bytes, with_header
from tests.factories.watching import watching

GOOD = {"dtype": "U8", "shape": [2, 2], "data_offsets": [0, 4]}


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def of(entries: Any, data: bytes = b"abcd") -> bytes:
    return with_header(json.dumps(entries).encode(), data)


def test_tensors_come_in_the_order_of_their_bytes_with_absolute_offsets(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {
        "late": {"dtype": "BF16", "shape": [3], "data_offsets": [4, 10]},
        "__metadata__": {"format": "pt"},
        "early": GOOD,
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [10, 10]},
        "scalar": {"dtype": "F64", "shape": [], "data_offsets": [10, 18]},
    }
    path.write_bytes(of(header, b"abcd" + b"ABCDEF" + b"12345678"))
    tensors = read_header(path)
    assert list(tensors) == ["early", "late", "empty", "scalar"]
    assert [t.read() for t in tensors.values()] == [b"abcd", b"ABCDEF", b"", b"12345678"]
    assert tensors["late"].shape == (3,) and tensors["late"].dtype == "BF16" and tensors["late"].nbytes == 6
    assert tensors["scalar"].shape == ()


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_reference_reader_is_read_as_it_reads_it(dtype: str, tmp_path: Path) -> None:
    data = bytes(range(DTYPE_BITS[dtype]))  # 8 elements
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"t": (dtype, (8,), data)}))
    assert read_header(path)["t"].read() == data
    assert bytes(deserialize(path.read_bytes())[0][1]["data"]) == data


def test_a_shard_cut_short_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    whole = safetensors_bytes({"a": ("U8", (2, 2), b"abcd"), "b": ("F16", (4,), b"12345678")})
    for length in range(len(whole)):
        refused(tmp_path / "cut.safetensors", whole[:length])


def test_a_file_with_bytes_behind_its_last_tensor_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path / "long.safetensors", of({"a": GOOD}, b"abcde"))
    assert "download the file again" in message


def test_a_file_cut_after_its_header_was_read_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(of({"weights": GOOD}))
    tensor = read_header(path)["weights"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"x\.safetensors ends inside weights"):
        tensor.read()


@pytest.mark.parametrize("length", [0, 1, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1, 100_000_001, 1000])
def test_a_header_length_that_cannot_be_right_is_refused_without_reading_it(length: int, tmp_path: Path) -> None:
    assert "header length" in refused(tmp_path / "x.safetensors", struct.pack("<Q", length) + b'{"a": 1}')


def test_a_header_larger_than_any_is_refused_also_where_the_file_has_as_many_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    os.truncate(path, 8 + MAX_HEADER_BYTES + 1)
    with pytest.raises(CheckpointError, match="header length"):
        read_header(path)


OFFSETS = {
    "begins late": [(1, 5)],
    "overlaps": [(0, 4), (2, 6)],
    "leaves a gap": [(0, 4), (5, 9)],
    "leaves the file": [(4, 8)],
    "ends beyond the file": [(0, 1 << 40)],
    "is negative": [(-4, 0)],
    "is backwards": [(4, 0)],
    "is the same twice": [(0, 4), (0, 4)],
}


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_offsets_that_do_not_tile_the_data_are_refused(offsets: list[tuple[int, int]], tmp_path: Path) -> None:
    entries = {f"t{i}": {"dtype": "U8", "shape": [4], "data_offsets": list(pair)} for i, pair in enumerate(offsets)}
    refused(tmp_path / "x.safetensors", of(entries, b"x" * 9))


ENTRIES: dict[str, Any] = {
    "not an object": 5,
    "null": None,
    "a list": [],
    "text": "U8",
    "no dtype": {"shape": [4], "data_offsets": [0, 4]},
    "no shape": {"dtype": "U8", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "U8", "shape": [4]},
    "an unknown dtype": {**GOOD, "dtype": "Q4_K"},
    "a dtype in lower case": {**GOOD, "dtype": "u8"},
    "a list as dtype": {**GOOD, "dtype": ["U8"]},
    "null as dtype": {**GOOD, "dtype": None},
    "a negative side": {**GOOD, "shape": [-2, -2]},
    "a float side": {**GOOD, "shape": [2.0, 2]},
    "a bool side": {**GOOD, "shape": [True, 4]},
    "text as side": {**GOOD, "shape": ["4"]},
    "null as side": {**GOOD, "shape": [None, 4]},
    "a nested shape": {**GOOD, "shape": [[4]]},
    "a number as shape": {**GOOD, "shape": 4},
    "null as shape": {**GOOD, "shape": None},
    "a shape too small": {**GOOD, "shape": [3]},
    "a shape too large": {**GOOD, "shape": [1 << 60]},
    "a shape that overflows": {**GOOD, "shape": [1 << 32, 1 << 32, 1 << 32]},
    "an integer of 1000 bits": {**GOOD, "shape": [1 << 1000]},
    "float offsets": {**GOOD, "data_offsets": [0.0, 4.0]},
    "bool offsets": {**GOOD, "shape": [1], "data_offsets": [False, True]},
    "text offsets": {**GOOD, "data_offsets": ["0", "4"]},
    "one offset": {**GOOD, "data_offsets": [4]},
    "three offsets": {**GOOD, "data_offsets": [0, 4, 4]},
    "an object as offsets": {**GOOD, "data_offsets": {"0": 0, "4": 4}},
    "null offsets": {**GOOD, "data_offsets": None},
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_that_is_not_a_tensors_is_refused_by_name(entry: Any, tmp_path: Path) -> None:
    assert "weights" in refused(tmp_path / "x.safetensors", of({"weights": entry}))


# The reference reader refuses these, so an engine would not load what was called sound.
@pytest.mark.parametrize("shape", [{}, ""], ids=["an object", "text"])
def test_an_empty_shape_that_is_not_a_list_is_refused(shape: Any, tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", of({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}, b"x"))


def test_a_shape_that_overflows_before_it_is_empty_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [1 << 61, 1 << 61, 0], "data_offsets": [0, 0]}
    refused(tmp_path / "x.safetensors", of({"a": entry}, b""))


def test_elements_that_do_not_fill_whole_bytes_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}
    refused(tmp_path / "x.safetensors", of({"a": entry}, b"xx"))


@pytest.mark.parametrize("metadata", [5, [], "pt", {"format": 1}, {"a": {"b": "c"}}], ids=repr)
def test_metadata_that_is_not_text_by_text_is_refused(metadata: Any, tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", of({"__metadata__": metadata, "a": GOOD}))


HEADERS = {
    "not JSON": b"not JSON at all",
    "a list": b"[]",
    "a number": b"12",
    "text": b'"ab"',
    "null": b"null",
    "cut": b'{"a": {"dtype"',
    "two documents": b"{}{}",
    "NUL bytes": b"\0" * 64,
    "invalid UTF-8": b'{"\xff\xfe": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
    "UTF-16": json.dumps({"a": GOOD}).encode("utf-16-le"),
    "UTF-16 with its mark": json.dumps({"a": GOOD}).encode("utf-16"),
    "UTF-8 with a mark": b"\xef\xbb\xbf" + json.dumps({"a": GOOD}).encode(),
    "half a character": b'{"\\ud800": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
    "a name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(GOOD).encode(),) * 2)),
    "metadata twice": b'{"__metadata__": {}, "__metadata__": {}, "a": %s}' % json.dumps(GOOD).encode(),
    "a field twice": b'{"a": {"dtype": "I8", "dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
    "an endless number": b'{"a": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 4]}}' % (b"4" * 5000),
    "not a number": b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 4]}}',
    "infinity": b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, Infinity]}}',
    "nested lists": b"[" * 500_000,
    "nested objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_not_one_is_refused(header: bytes, tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", with_header(header, b"abcd"))


def test_a_name_as_long_as_the_header_is_not_repeated_in_the_message(tmp_path: Path) -> None:
    assert len(refused(tmp_path / "x.safetensors", of({"n" * 1_000_000: 5}))) < 1000


def test_a_shape_of_many_sides_is_refused_without_multiplying_them_all(tmp_path: Path) -> None:
    """The product has 30 million bits, and making it takes many minutes."""
    entry = {**GOOD, "shape": [1 << 61] * 500_000}
    with watching():
        refused(tmp_path / "x.safetensors", of({"a": entry}))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_file_of_any_number_of_tensors_is_read(count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({f"t{i}": ("I16", (i,), b"ab" * i) for i in range(count)}))
    assert {n: t.shape for n, t in read_header(path).items()} == {f"t{i}": (i,) for i in range(count)}


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_checkpoint_or_a_checkpoint_error(data: bytes, tmp_path: Path) -> None:
    _agrees(tmp_path, data)
    _agrees(tmp_path, with_header(data, data))


json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "Q4"]) | json_value,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_value,
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | json_value,
    }
)


@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entry | json_value), size=st.integers(0, 16))
def test_any_header_is_a_checkpoint_or_a_checkpoint_error(header: Any, size: int, tmp_path: Path) -> None:
    _agrees(tmp_path, with_header(json.dumps(header).encode(), b"x" * size))


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_altered_byte_of_a_header_is_read_as_the_reference_reader_reads_it(
    position: int, value: int, tmp_path: Path
) -> None:
    whole = bytearray(safetensors_bytes({"a": ("U8", (2, 2), b"abcd"), "b": ("BF16", (1, 4), b"12345678")}))
    whole[position % (len(whole) - 12)] = value
    _agrees(tmp_path, bytes(whole))


def _agrees(folder: Path, data: bytes) -> None:
    """What is read here is read by the reference reader too, and the same; nothing but CheckpointError is raised."""
    path = folder / "x.safetensors"
    path.write_bytes(data)
    try:
        ours = {n: (t.dtype, list(t.shape), t.read()) for n, t in read_header(path).items()}
    except CheckpointError:
        return
    try:
        theirs = {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in deserialize(data)}
    except SafetensorError as error:
        pytest.fail(f"the reference reader refuses what was accepted: {error}")
    assert ours == theirs
