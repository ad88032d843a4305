"""Matrices of every format are read as they were meant, and what does not fit is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from requant.tasks.checkpoint import dequantize
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.rounded_inputs import rounded_inputs
from requant.tasks.checkpoint.stored_matrix import StoredMatrix, stored_matrix
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import Raw, write_checkpoint

ROWS, INPUTS, GROUP = 5, 64, 16
COMPRESSED = {"quant_method": "compressed-tensors"}
RANDOM = np.random.default_rng(0)
SCALES = RANDOM.uniform(0.5, 2, (ROWS, INPUTS // GROUP)).astype(np.float32)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def spread(by_group: Any) -> Any:
    return np.repeat(by_group, GROUP, axis=1)


def f32(values: Any) -> tuple[str, tuple[int, ...], bytes]:
    values = np.asarray(values, "<f4")
    return ("F32", values.shape, values.tobytes())


def words(codes: Any, bits: int, dense: bool) -> tuple[str, tuple[int, ...], bytes]:
    """Unsigned codes `[rows, n]` as int32 words, the lowest bits first."""
    rows = []
    for row in codes.tolist():
        if dense:
            whole = sum(code << bits * at for at, code in enumerate(row))
            rows.append(whole.to_bytes(-(-len(row) * bits // 32) * 4, "little"))
        else:
            each = 32 // bits
            parts = [row[at : at + each] for at in range(0, len(row), each)]
            rows.append(b"".join(sum(c << bits * i for i, c in enumerate(p)).to_bytes(4, "little") for p in parts))
    return ("I32", (len(rows), len(rows[0]) // 4), b"".join(rows))


def turned(packed: tuple[str, tuple[int, ...], bytes]) -> tuple[str, tuple[int, ...], bytes]:
    dtype, shape, data = packed
    return (dtype, shape[::-1], np.frombuffer(data, "<i4").reshape(shape).T.tobytes())


def nibbles(codes: Any) -> tuple[str, tuple[int, ...], bytes]:
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    return ("U8", pairs.shape, pairs.tobytes())


def opened(folder: Path, parts: Raw, config: dict[str, Any] | None = None) -> Checkpoint:
    shard = {f"m.{part}": value for part, value in parts.items()}
    document = {"model_type": "llama", "quantization_config": COMPRESSED if config is None else config}
    return Checkpoint.open(write_checkpoint(folder, {"model.safetensors": shard}, document, index=False))


def read(folder: Path, parts: Raw, config: dict[str, Any] | None = None) -> StoredMatrix:
    checkpoint = opened(folder, parts, config)
    return stored_matrix(checkpoint, checkpoint.modules["m"])


def weight_of(matrix: StoredMatrix) -> Any:
    return dequantize.weight_of(matrix, torch.device("cpu"), torch.float32).numpy()


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "as before 0.19"])
@pytest.mark.parametrize("zeros", [True, False], ids=["zero points", "symmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_integers_of_every_width_are_read(bits: int, zeros: bool, dense: bool, tmp_path: Path) -> None:
    codes = RANDOM.integers(0, 1 << bits, (ROWS, INPUTS))
    points = RANDOM.integers(0, 1 << bits, SCALES.shape) if zeros else np.full(SCALES.shape, 1 << bits - 1)
    parts = {
        "weight_packed": words(codes, bits, dense),
        "weight_scale": f32(SCALES),
        "weight_shape": ("I64", (2,), np.array([ROWS, INPUTS], "<i8").tobytes()),
    }
    if zeros:
        parts["weight_zero_point"] = turned(words(points.T, bits, dense))
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "group_size": GROUP}}
    matrix = read(tmp_path, parts, {**COMPRESSED, "format": "pack-quantized", "config_groups": {"g": group}})
    np.testing.assert_array_equal(weight_of(matrix), ((codes - spread(points)) * spread(SCALES)).astype(np.float32))
    assert (matrix.bits, matrix.shape, matrix.step) == (bits, (ROWS, INPUTS), 1.0)


def test_groups_in_another_order_are_read(tmp_path: Path) -> None:
    codes, group = RANDOM.integers(0, 16, (ROWS, INPUTS)), RANDOM.permutation(np.arange(INPUTS) // GROUP)
    parts = {
        "weight_packed": words(codes, 4, True),
        "weight_scale": f32(SCALES),
        "weight_shape": ("I64", (2,), np.array([ROWS, INPUTS], "<i8").tobytes()),
        "weight_g_idx": ("I32", (INPUTS,), group.astype("<i4").tobytes()),
    }
    np.testing.assert_array_equal(weight_of(read(tmp_path, parts)), ((codes - 8) * SCALES[:, group]).astype(np.float32))
    parts["weight_g_idx"] = ("I32", (INPUTS,), (group + 1).astype("<i4").tobytes())
    with pytest.raises(CheckpointError, match="names groups that there are not"):
        read(tmp_path / "other", parts)


@pytest.mark.parametrize("zeros", [True, False])
def test_integers_of_8_bits_are_read(zeros: bool, tmp_path: Path) -> None:
    codes = RANDOM.integers(-128, 128, (ROWS, INPUTS)).astype(np.int8)
    points = RANDOM.integers(-9, 9, SCALES.shape).astype(np.int8) if zeros else np.zeros(SCALES.shape, np.int8)
    parts = {"weight": ("I8", codes.shape, codes.tobytes()), "weight_scale": f32(SCALES)}
    if zeros:
        parts["weight_zero_point"] = ("I8", points.shape, points.tobytes())
    meant = (codes.astype(int) - spread(points.astype(int))) * spread(SCALES)
    np.testing.assert_array_equal(weight_of(read(tmp_path, parts)), meant.astype(np.float32))


NVFP4: dict[str, tuple[str, Raw, float]] = {
    "compressed-tensors": ("weight_packed", {"weight_global_scale": f32([8.0])}, 1 / 8),
    "ModelOpt": ("weight", {"weight_scale_2": f32(0.25)}, 0.25),
}


@pytest.mark.parametrize("maker", NVFP4)
def test_e2m1_with_two_scales_is_read(maker: str, tmp_path: Path) -> None:
    name, overall, factor = NVFP4[maker]
    codes = RANDOM.integers(0, 16, (ROWS, INPUTS))
    exponents = RANDOM.integers(4, 11, SCALES.shape).astype(np.uint8)  # E4M3 without a mantissa: 2 ** (e - 7)
    parts = {name: nibbles(codes), "weight_scale": ("F8_E4M3", SCALES.shape, (exponents << 3).tobytes()), **overall}
    config = COMPRESSED if maker != "ModelOpt" else {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    meant = np.array(E2M1)[codes] * spread(2.0 ** (exponents - 7.0)) * factor
    matrix = read(tmp_path, parts, config)
    np.testing.assert_array_equal(weight_of(matrix), meant.astype(np.float32))
    assert matrix.zeros is None and matrix.bits == 4


def test_e2m1_with_exponents_is_read(tmp_path: Path) -> None:
    codes, exponents = RANDOM.integers(0, 16, (ROWS, INPUTS)), RANDOM.integers(120, 130, SCALES.shape).astype(np.uint8)
    parts = {"weight_packed": nibbles(codes), "weight_scale": ("U8", SCALES.shape, exponents.tobytes())}
    meant = np.array(E2M1)[codes] * spread(2.0 ** (exponents - 127.0))
    np.testing.assert_array_equal(weight_of(read(tmp_path, parts)), meant.astype(np.float32))


def test_blocks_at_the_edge_are_as_the_config_says(tmp_path: Path) -> None:
    """192 rows in blocks of 128 are 128 and 64, and not two times 96."""
    codes, scales = np.full((192, 64), 0x38, np.uint8), np.array([[1.0], [2.0]], np.float32)  # 0x38 is 1
    parts = {"weight": ("F8_E4M3", codes.shape, codes.tobytes()), "weight_scale": f32(scales)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "block_structure": [128, 128]}}
    weight = weight_of(read(tmp_path, parts, {**COMPRESSED, "config_groups": {"g": group}}))
    assert weight[:128].max() == 1 and weight[128:].min() == 2


@given(
    weight=st.sampled_from(["I8", "U8", "I32", "F8_E4M3"]),
    packed=st.booleans(),
    shapes=st.tuples(*[st.lists(st.integers(0, 6), max_size=3)] * 4),
)
def test_tensors_that_do_not_fit_each_other_are_refused_by_name(
    weight: str, packed: bool, shapes: tuple[list[int], ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the shapes are: a matrix of the shape that is said, or CheckpointError."""
    width = {"I32": 4}.get(weight, 1)
    names = ("weight_packed" if packed else "weight", "weight_scale", "weight_zero_point", "weight_g_idx")
    dtypes = (weight, "F32", "I8", "I32")
    sizes = {"F32": 4, "I32": 4, "I8": 1, weight: width}
    parts = {
        name: (dtype, tuple(shape), bytes(int(np.prod(shape)) * sizes[dtype]))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    }
    try:
        matrix = read(tmp_path_factory.mktemp("fuzz"), parts)
    except CheckpointError as error:
        assert re.search(r"\bm\b", str(error))
        return
    assert weight_of(matrix).shape == matrix.shape


INPUT_BITS: list[tuple[dict[str, Any], int | None]] = [
    ({"quant_method": "auto-round", "bits": 4, "act_bits": 16}, None),
    ({"quant_method": "auto-round", "bits": 4, "act_bits": 4}, 4),
    ({"quant_method": "gptq", "bits": 4}, None),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, 8),
    ({**COMPRESSED, "config_groups": {"g": {"input_activations": {"num_bits": 8}}, "h": {}}}, 8),
    ({**COMPRESSED, "config_groups": {"g": {"input_activations": None}}}, None),
    ({**COMPRESSED, "config_groups": ["g"]}, None),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4),
    ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, None),
    ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, 8),
    ({"quant_method": "hqq"}, None),
]


@pytest.mark.parametrize(("config", "bits"), INPUT_BITS)
def test_rounded_inputs_are_told(config: dict[str, Any], bits: int | None, tmp_path: Path) -> None:
    told = rounded_inputs(opened(tmp_path, {"weight": f32([[1.0]])}, config))
    assert (told is None) == (bits is None) and f"to {bits} bits" in (told or f"to {bits} bits")
