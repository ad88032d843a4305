"""Packs integer weights into int32 words with numpy alone. `dequantize.py` unpacks them, with torch.

GPTQ (auto-round's `auto_round:auto_gptq`, AutoGPTQ), with b bits and `32 / b` values in a word:

    qweight  int32 [in * b / 32, out]         packed along the input
    qzeros   int32 [in / group, out * b / 32] packed along the output
    scales   fp16  [in / group, out]
    g_idx    int32 [in]                       the group of each input; optional

The weight is `(q - zero point) * scale`. Version 1 of the format stores the zero point minus one in `qzeros`: 7 for the
symmetric zero point 8. Version 2 (`gptq_v2`) stores the zero point itself.

AWQ (`auto_round:auto_awq`): `qweight` int32 `[in, out * b / 32]` is packed along the output in the order 0, 2, 4, 6, 1,
3, 5, 7, and so is `qzeros`, which stores the zero points themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.writer import Computed
from requant.tasks.errors import CheckpointError

REQUIRED = ("qweight", "qzeros", "scales")
BITS = (2, 3, 4, 8)  # the widths that Requant can dequantize; AWQ has 4 only
GPTQ_DTYPES = {"qweight": {"I32"}, "qzeros": {"I32"}, "g_idx": {"I32"}, "scales": {"F16", "BF16", "F32"}}
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # factors that `pack` tries on the scales of 4 bits
MIN_SCALE = 2.0**-20  # for groups of zeros; float16 can represent it
STRIPE_ROWS = 512  # rows of a weight in memory at once; a multiple of 32, so that no word belongs to two stripes
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NUMPY = {"I32": "<i4", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1", "I8": "i1"}

Packing = Literal["gptq", "gptq_v2", "awq"]
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PackingScheme:
    """How one module is packed. Group size -1: one group for the complete input."""

    bits: int
    group_size: int
    packing: Packing = "gptq"

    @classmethod
    def of_parts(cls, parts: Mapping[str, Tensor], like: PackingScheme | None = None) -> PackingScheme | None:
        """Read a scheme from the shapes of a module's parts; None if they fit no scheme, or are not complete.

        Shapes leave two things open, which are taken from `like`: the version of GPTQ's format, and the group size if
        the last group may be smaller than the others.
        """
        if any(part not in parts or len(parts[part].shape) != 2 for part in REQUIRED):
            return None
        (rows, columns), (groups, out_features) = parts["qweight"].shape, parts["scales"].shape
        packing: Packing = "gptq" if like is None or like.packing == "awq" else like.packing
        packing = packing if columns == out_features else "awq"
        for bits in (4,) if packing == "awq" else BITS:
            inputs = rows if packing == "awq" else rows * 32 // bits
            group_size = -1 if groups == 1 else inputs // max(groups, 1)
            for size in ([like.group_size] if like else []) + [group_size]:
                scheme = cls(bits, size, packing)
                if inputs and size and check_parts("", parts, scheme, (out_features, inputs)) is None:
                    return scheme
        return None

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the packed parts of a weight `[out, in]`."""
        groups = 1 if self.group_size == -1 else -(-in_features // self.group_size)
        words = out_features * self.bits // 32
        if self.packing == "awq":
            qweight: tuple[int, ...] = (in_features, words)
        else:
            qweight = (in_features * self.bits // 32, out_features)
        return {
            "qweight": qweight,
            "qzeros": (groups, words),
            "scales": (groups, out_features),
            "g_idx": (in_features,),
        }

    def weight_shape(self, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the shape `[out, in]` of the weight that was packed; empty if the parts are not matrices."""
        qweight, scales = parts["qweight"].shape, parts["scales"].shape
        if len(qweight) != 2 or len(scales) != 2:
            return ()
        return scales[1], qweight[0] if self.packing == "awq" else qweight[0] * 32 // self.bits


def check_parts(module: str, parts: Mapping[str, Tensor], scheme: PackingScheme, weight: tuple[int, ...]) -> str | None:
    """Return what is wrong with the packed parts of a weight `[out, in]` as a sentence, or None."""
    if len(weight) != 2:
        return f"{module} is packed and no matrix in the base"
    missing = [part for part in REQUIRED if part not in parts]
    if missing:
        return f"{module}.{missing[0]} is missing beside {module}.qweight"
    expected = scheme.shapes(*weight)
    for part, tensor in parts.items():
        if tensor.shape != expected[part]:
            return f"{module}.{part} has shape {tensor.shape}, its scheme needs {expected[part]}"
        if tensor.dtype not in GPTQ_DTYPES[part]:
            return f"{module}.{part} has dtype {tensor.dtype}, packed are {' or '.join(sorted(GPTQ_DTYPES[part]))}"
    return None


def pack(rows: Iterable[Floats], shape: tuple[int, int], scheme: PackingScheme) -> dict[str, Array]:
    """Quantize a weight `[out, in]` symmetrically by rounding to nearest, and pack it.

    `rows`: float32 stripes of the weight, from the top. The scale of a group is its largest magnitude divided by the
    largest integer. With 4 bits, each factor in CLIPPING is tried on it, and the one with the least squared error
    counts. Raises CheckpointError if the sides are not multiples of groups and words.
    """
    out_features, in_features = shape
    group = in_features if scheme.group_size == -1 else scheme.group_size
    per_word = 32 // scheme.bits
    if 32 % scheme.bits or in_features % group or in_features % per_word or out_features % per_word:
        raise CheckpointError(f"a weight of {out_features} x {in_features} cannot be packed with {scheme}")
    half = 1 << (scheme.bits - 1)
    integers = np.empty((in_features, out_features), np.uint8)
    scales = np.empty((in_features // group, out_features), np.float16)
    begin = 0
    for stripe in rows:
        end = begin + len(stripe)
        groups = stripe.reshape(-1, in_features // group, group)
        scale = _scales(groups, half)
        rounded = np.clip(np.rint(groups / scale), -half, half - 1) + half
        integers[:, begin:end] = rounded.reshape(end - begin, -1).T
        scales[:, begin:end] = scale[..., 0].T
        begin = end
    zeros = np.full(scales.shape, half - (scheme.packing == "gptq"), np.uint8)
    if scheme.packing == "awq":
        by_word = integers.reshape(in_features, -1, len(AWQ_ORDER))[..., np.array(AWQ_ORDER)]
        qweight = _words(by_word.reshape(in_features, -1), scheme.bits, 1)
    else:
        qweight = _words(integers, scheme.bits, 0)
    return {"qweight": qweight, "qzeros": _words(zeros, scheme.bits, 1), "scales": scales}


def _scales(groups: Floats, half: int) -> Floats:
    """Return the scale `[rows, groups, 1]` of each group that has the least squared error, rounded to float16."""
    largest = np.abs(groups).max(-1, keepdims=True)
    best = np.full(largest.shape, np.inf, np.float32)
    scales: Floats = np.ones_like(largest)
    for ratio in CLIPPING if half == 8 else (1.0,):
        tried = np.maximum(largest * ratio / (half - 1), MIN_SCALE).astype(np.float16).astype(np.float32)
        error = np.square(np.clip(np.rint(groups / tried), -half, half - 1) * tried - groups).sum(-1, keepdims=True)
        scales[error < best] = tried[error < best]
        best = np.minimum(error, best)
    return scales


def _words(values: Array, bits: int, axis: int) -> Array:
    """Pack unsigned integers into int32 words along `axis`, lowest bits first. The width must divide 32."""
    per_word = 32 // bits
    words = sum(
        (values[number::per_word] if axis == 0 else values[:, number::per_word]).astype(np.uint32)
        << np.uint32(bits * number)
        for number in range(per_word)
    )
    return np.ascontiguousarray(words).view(np.int32)


def float_rows(tensor: Tensor) -> Iterator[Floats]:
    """Read a matrix in float32 stripes of STRIPE_ROWS rows."""
    if isinstance(tensor, Computed):
        for rows in tensor.compute():
            yield _values(rows, tensor.dtype).astype(np.float32).reshape(-1, tensor.shape[1])
        return
    count, width = tensor.shape
    nbytes = tensor.nbytes // max(count, 1)
    for begin in range(0, count, STRIPE_ROWS):
        end = min(begin + STRIPE_ROWS, count)
        part = replace(
            tensor, shape=(end - begin, width), begin=tensor.begin + begin * nbytes, end=tensor.begin + end * nbytes
        )
        yield to_numpy(part).astype(np.float32)


def to_numpy(tensor: Tensor) -> Array:
    """Read a tensor; BF16 becomes float32. Raises CheckpointError for a dtype that numpy does not have."""
    if tensor.dtype != "BF16" and tensor.dtype not in NUMPY:
        raise CheckpointError(f"{tensor.name} has dtype {tensor.dtype}, which cannot be read here")
    return _values(tensor.read(), tensor.dtype).reshape(tensor.shape)


def _values(raw: bytes, dtype: str) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype=NUMPY[dtype])


def to_bytes(values: Array, dtype: str) -> bytes:
    """Convert an array to the bytes of a safetensors dtype; float32 is rounded to BF16 to nearest even."""
    if dtype != "BF16":
        return np.ascontiguousarray(values, dtype=NUMPY[dtype]).tobytes()
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2").tobytes()


def scales_of(parts: Mapping[str, Tensor], scale_dtype: str | None = None) -> Floats:
    """Return the scales of packed parts, float32 `[groups, out]`; with `scale_dtype`, rounded to it."""
    scales: Floats = to_numpy(parts["scales"]).astype(np.float32)
    return scales if scale_dtype is None else rounded_to(scales, scale_dtype)


def rounded_to(values: Floats, dtype: str) -> Floats:
    """Round float32 values to a floating-point dtype of safetensors."""
    rounded: Floats = _values(to_bytes(values, dtype), dtype).reshape(values.shape).astype(np.float32)
    return rounded
