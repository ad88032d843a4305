"""Every packing is dequantized to the very bits of its formula, in stripes of any height."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from requant.tasks.checkpoint import dequantize
from requant.tasks.checkpoint.dequantize import stripes, weight_of
from requant.tasks.checkpoint.header import read_header
from requant.tasks.checkpoint.packing import BITS, PackingScheme
from requant.tasks.checkpoint.stored_matrix import packed_matrix
from tests.factories.checkpoints import Raw, safetensors_bytes

CPU = torch.device("cpu")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SCHEMES = [(bits, packing) for packing in ("gptq", "gptq_v2") for bits in BITS] + [(4, "awq")]


def words(codes: Any, bits: int) -> Any:
    """Return codes `[rows, n]` as int32 words `[rows, n * bits / 32]`: each row is one number, written in base 2."""
    rows = [sum(code << bits * at for at, code in enumerate(row)) for row in codes.tolist()]
    return np.stack([np.frombuffer(row.to_bytes(codes.shape[1] * bits // 8, "little"), "<i4") for row in rows])


def in_awq_order(codes: Any) -> Any:
    return codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].reshape(len(codes), -1)


def packed(bits: int, packing: str, codes: Any, zeros: Any, scales: Any) -> Raw:
    """Pack codes `[out, in]`, zero points and scales `[groups, out]`."""
    if packing == "awq":
        qweight, qzeros = words(in_awq_order(codes.T), bits), words(in_awq_order(zeros), bits)
    else:
        stored = (zeros - 1) % (1 << bits) if packing == "gptq" else zeros
        qweight, qzeros = np.ascontiguousarray(words(codes, bits).T), words(stored, bits)
    arrays = {"qweight": (qweight, "I32"), "qzeros": (qzeros, "I32"), "scales": (scales, "F16")}
    return {name: (dtype, array.shape, array.tobytes()) for name, (array, dtype) in arrays.items()}


@given(
    scheme=st.sampled_from(SCHEMES),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([32, 64])),
    whole_rows=st.booleans(),
    in_order=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1 << 30),
)
def test_packed_weights_are_the_bits_of_their_formula(
    scheme: tuple[int, Any],
    sizes: tuple[int, int, int],
    whole_rows: bool,
    in_order: bool,
    dtype: torch.dtype,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    (bits, packing), (down, groups, size), random = scheme, sizes, np.random.default_rng(seed)
    groups, size = (1, groups * size) if whole_rows else (groups, size)
    out_features, inputs = 32 * down, groups * size
    codes = random.integers(0, 1 << bits, (out_features, inputs))
    zeros = random.integers(0, 1 << bits, (groups, out_features))
    scales = random.normal(0, 0.02, (groups, out_features)).astype(np.float16)
    group = np.arange(inputs) // size
    parts = packed(bits, packing, codes, zeros, scales)
    if not in_order:
        group = random.permutation(group)
        parts["g_idx"] = ("I32", group.shape, group.astype("<i4").tobytes())
    path = tmp_path_factory.mktemp("packed") / "x.safetensors"
    path.write_bytes(safetensors_bytes(parts))
    matrix = packed_matrix(read_header(path), PackingScheme(bits, -1 if whole_rows else size, packing), "m")
    exact = (codes - zeros.T[:, group]).astype(np.float32) * scales.astype(np.float32).T[:, group]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dequantize.STRIPE_WEIGHTS, "cpu", 32 * inputs)
        heights = [len(stripe) for stripe in stripes(matrix, CPU)]
        found = weight_of(matrix, CPU, dtype)
    assert heights == [32] * down
    expected = torch.from_numpy(exact).to(dtype)
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
