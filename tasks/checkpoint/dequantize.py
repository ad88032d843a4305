"""Dequantizes the matrices that stored_matrix.py describes with torch: `(code - zero point) * scale`, in float32.

Subtraction and multiplication in float32 are rounded in one way only, so that every device computes the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

from requant.tasks.checkpoint.fp8 import Dequantized
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.packing import AWQ_ORDER
from requant.tasks.checkpoint.stored_matrix import Codes, StoredMatrix, matrices_of_fp8
from requant.tasks.checkpoint.torch_tensor import to_torch

# Weights that are computed at a time. On a CPU they stay in its cache; on a GPU one more launch of a kernel costs more.
STRIPE_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 24}
ROWS_OF_WORDS = 32  # Stripes are multiples of it, so that no word belongs to two of them.
POSITIVE_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # The highest of the 4 bits is the sign.


def plain_tensor(tensor: Tensor, device: torch.device) -> torch.Tensor:
    """Read a tensor that is not packed on a device, as `to_torch`. An FP8 weight is computed there, as BF16."""
    if not isinstance(tensor, Dequantized):
        return to_torch(tensor, device)
    matrices = [weight_of(matrix, device, torch.bfloat16) for matrix in matrices_of_fp8(tensor)]
    return (matrices[0] if len(matrices) == 1 else torch.stack(matrices)).reshape(tensor.shape)


def weight_of(matrix: StoredMatrix, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Compute a matrix, `[out, in]`, rounded to a dtype, on a device."""
    weight = torch.empty(matrix.shape, dtype=dtype, device=device)
    row = 0
    for stripe in stripes(matrix, device):
        weight[row : row + len(stripe)] = stripe
        row += len(stripe)
    return weight


def stripes(matrix: StoredMatrix, device: torch.device) -> Iterator[torch.Tensor]:
    """Compute a matrix on a device, and yield it as float32 stripes `[rows, in]` from the top."""
    raw = _raw(matrix.codes, device)
    scales = torch.from_numpy(matrix.scales).to(device).T
    zeros = zero_points(matrix, device)
    groups = group_of_inputs(matrix, device)
    for rows in stripe_rows(matrix.shape, device):
        weight = _unpacked(matrix.codes, raw, rows).float().contiguous()
        by_group = weight.view(len(weight), len(matrix.scales), -1) if groups is None else weight
        if zeros is not None:
            by_group -= _spread(zeros.T[rows].float(), groups)
        by_group *= _spread(scales[rows], groups)
        yield weight


def stripe_rows(shape: tuple[int, int], device: torch.device) -> Iterator[slice]:
    """Divide a matrix of this shape into stripes, from the top."""
    step = STRIPE_WEIGHTS.get(device.type, STRIPE_WEIGHTS["cuda"]) // max(shape[1], 1)
    step = max(step // ROWS_OF_WORDS, 1) * ROWS_OF_WORDS
    return (slice(begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step))


def zero_points(matrix: StoredMatrix, device: torch.device) -> torch.Tensor | None:
    """Return the zero points, uint8 `[groups, out]`; None for floating-point codes."""
    if isinstance(matrix.zeros, Codes):
        return _unpacked(matrix.zeros, _raw(matrix.zeros, device), slice(None)).to(torch.uint8)
    return None if matrix.zeros is None else torch.from_numpy(matrix.zeros).to(device)


def group_of_inputs(matrix: StoredMatrix, device: torch.device) -> torch.Tensor | None:
    """Return the group of each input; None if the groups are of equal size and in order."""
    count, inputs = len(matrix.scales), len(matrix.group)
    if count and inputs and not inputs % count and np.array_equal(matrix.group, np.arange(inputs) // (inputs // count)):
        return None
    return torch.from_numpy(matrix.group.astype(np.int64)).to(device)


def _spread(by_group: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
    """Return values `[rows, groups]` for each input, `[rows, in]`, or to be broadcast to `[rows, groups, size]`."""
    return by_group[..., None] if groups is None else by_group[:, groups]


def _raw(codes: Codes, device: torch.device) -> torch.Tensor:
    """Read the tensor of codes. The first dimension is the rows of the matrix, but for `awq_columns`."""
    raw = to_torch(codes.tensor, device)
    return raw.T if codes.layout in ("columns", "loose_columns") else raw


def _unpacked(codes: Codes, raw: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return some rows of the codes, `[rows, count]`."""
    match codes.layout:
        case "int8":
            return raw[rows].to(torch.int16) + 128
        case "float8":
            return raw[rows]
        case "e2m1":
            pairs = raw[rows]
            return _e2m1(raw.device)[torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).int()]
        case "awq_columns":
            each = len(AWQ_ORDER)
            return unpack(raw[:, rows.start // each : -(-rows.stop // each)], codes.bits, order=AWQ_ORDER).T
        case "awq":
            return unpack(raw[rows], codes.bits, order=AWQ_ORDER)
        case "dense" | "columns" | "loose" | "loose_columns":
            dense = codes.layout in ("dense", "columns")
            unpacked = unpack(raw[rows], codes.bits, dense=dense)[:, : codes.count]
            return (unpacked + codes.offset) & ((1 << codes.bits) - 1) if codes.offset else unpacked


def unpack(words: torch.Tensor, bits: int, *, dense: bool = True, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Unpack int32 words `[rows, words]` to as many codes as they can hold, int32 `[rows, codes]`.

    The lowest bits come first. `dense`: words have no unused bits. `order`: the place in its word of each code.
    """
    mask, words = (1 << bits) - 1, words.contiguous()
    if 32 % bits == 0 or not dense:
        shifts = bits * torch.arange(32 // bits, dtype=torch.int32, device=words.device)
        if order:
            shifts = shifts[[order.index(place) for place in range(len(order))]]
        return ((words[..., None] >> shifts) & mask).flatten(1)
    begins = torch.arange(words.shape[1] * 32 // bits, device=words.device) * bits
    low, high = begins // 32, (begins // 32 + 1).clamp(max=words.shape[1] - 1)
    both = (words[:, low].long() & 0xFFFFFFFF) | (words[:, high].long() << 32)
    return ((both >> (begins % 32)) & mask).int()


@functools.cache
def _e2m1(device: torch.device) -> torch.Tensor:
    """Return the 16 values of E2M1, indexed by their bits."""
    positive = torch.tensor(POSITIVE_E2M1, device=device)
    return torch.cat([positive, -positive])
