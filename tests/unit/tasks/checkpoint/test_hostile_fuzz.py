"""Made-up headers, indexes and configs: nothing but a checkpoint or a CheckpointError, told in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from requant.tasks.checkpoint.checkpoint import INDEX, Checkpoint
from requant.tasks.checkpoint.header import DTYPE_BITS, read_header
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import safetensors_bytes, with_header
from tests.factories.watching import is_one_sentence, snapshot, watching

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

name = st.sampled_from(["a", "b", "mtp.fc.weight", "model.layers.9.weight", "__metadata__"]) | st.text(max_size=6)
number = st.integers(-2, 20) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30]) | st.floats() | st.booleans()
leaf = st.none() | number | st.text(max_size=5)
value = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(name, inner, max_size=3), max_leaves=6
)
shard = st.sampled_from(
    [ONE, TWO, f"../{ONE}", f"/{ONE}", f"./{ONE}", "", ".", "..", "config.json", "a\\b", "a\0.safetensors", ONE + "/"]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file of a few tensors, with some of its bytes, numbers or entries changed."""
    tensors = {}
    for index in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from([d for d, bits in DTYPE_BITS.items() if bits % 8 == 0]))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        count = 1
        for side in shape:
            count *= side
        tensors[draw(st.just(f"t{index}") | name)] = (dtype, shape, b"x" * (count * DTYPE_BITS[dtype] // 8))
    whole = safetensors_bytes(tensors)
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for _ in range(draw(st.integers(0, 2))):
        entry = header.get(draw(st.sampled_from(sorted(header))))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        if isinstance(entry, dict):
            entry[key] = draw(value | st.lists(number, max_size=3))
    if draw(st.booleans()):
        header[draw(name)] = draw(value)
    raw = bytearray(
        with_header(json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"), data)
    )
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(0, len(raw)))] if draw(st.integers(0, 4)) == 0 else raw)


@given(data=mutated())
def test_a_mutated_file_is_refused_or_read_as_the_reference_reader_reads_it(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    ours = told(lambda: {n: (t.dtype, list(t.shape), t.read()) for n, t in read_header(path).items()}, path.name)
    try:
        theirs = {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in deserialize(data)}
    except SafetensorError:
        theirs = None
    assert ours is None or ours == theirs
    assert theirs is None or ours is not None or documented(data)


def documented(data: bytes) -> bool:
    """Whether a header is of the kinds that only Requant refuses."""
    again = False

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal again
        again = again or len(dict(found)) != len(found)
        return dict(found)

    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length], object_pairs_hook=pairs)
    entries = [entry for key, entry in header.items() if key != "__metadata__"]
    numbers = (n for entry in entries for n in (*entry["shape"], *entry["data_offsets"]))
    return (
        again or any(len(e) > 3 or not isinstance(e["dtype"], str) for e in entries) or any(n >= 2**62 for n in numbers)
    )


def told(work: Callable[[], Any], named: str) -> Any:
    """What comes of it, or None for a CheckpointError that is one sentence and names the file."""
    with watching() as watch:
        try:
            return work()
        except CheckpointError as error:
            assert is_one_sentence(str(error)) and named in str(error)
            return None
        finally:
            assert watch.changed == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / ONE).write_bytes(safetensors_bytes({"a": ("U8", (4,), b"evil")}))
    (folder / ONE).write_bytes(safetensors_bytes({"a": ("U8", (4,), b"abcd"), "mtp.fc.weight": ("U8", (1,), b"x")}))
    (folder / TWO).write_bytes(safetensors_bytes({"b": ("U8", (4,), b"abcd")}))
    (folder / "config.json").write_text('{"num_hidden_layers": 2}')
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": ONE, "mtp.fc.weight": ONE, "b": TWO}}))
    return folder


def looked_at(folder: Path) -> Checkpoint | None:
    """Open a checkpoint; only files of the folder are read, nothing is changed."""
    before = snapshot(folder.parent)
    checkpoint = None
    with watching() as watch:
        try:
            checkpoint = Checkpoint.open(folder)
            assert checkpoint.head is None or checkpoint.head.names
            assert isinstance(checkpoint.quantization, dict) and checkpoint.modules is not None
            assert all(map(is_one_sentence, checkpoint.problems))
            checkpoint.sound()
        except CheckpointError as error:
            assert is_one_sentence(str(error)) and str(folder) in str(error)
    assert watch.changed == [] and all(path.startswith(f"{folder}/") for path in watch.read)
    assert snapshot(folder.parent) == before
    return checkpoint


@given(weight_map=st.dictionaries(name, shard | value, max_size=5) | value, metadata=value)
def test_any_index_is_a_checkpoint_with_problems_or_a_checkpoint_error(
    weight_map: Any, metadata: Any, folder: Path
) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    checkpoint = looked_at(folder)
    whole = {"a": ONE, "mtp.fc.weight": ONE, "b": TWO}
    if checkpoint is not None and not checkpoint.fatal:
        assert all(weight_map[n] == whole[n] and t.read() != b"evil" for n, t in checkpoint.tensors.items())


@given(
    config=st.dictionaries(
        st.sampled_from(
            [
                "text_config",
                "quantization_config",
                "num_hidden_layers",
                "num_nextn_predict_layers",
                "compression_config",
            ]
        ),
        value | st.dictionaries(st.sampled_from(["num_hidden_layers", "mtp_num_hidden_layers", "bits"]), value),
        max_size=4,
    )
)
def test_any_config_is_a_checkpoint_or_a_checkpoint_error(config: Any, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    looked_at(folder)


@given(data=st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0dNaI-1e"', max_size=40).map(str.encode))
def test_any_bytes_for_an_index_or_config_are_a_checkpoint_or_a_checkpoint_error(data: bytes, folder: Path) -> None:
    for file in (INDEX, "config.json"):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(data)
        looked_at(folder)
        (folder / file).write_bytes(whole)
