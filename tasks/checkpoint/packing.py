"""Packed integer weights: shapes, and back to real values, with numpy alone.

GPTQ packing (auto-round's `auto_round:auto_gptq`, AutoGPTQ): for `bits` b and `32 / b` values a word,
`qweight` int32 `[in * b / 32, out]` packs along the input, `qzeros` int32 `[in / group, out * b / 32]` along the
output, `scales` fp16 `[in / group, out]`, optional `g_idx` int32 `[in]`. The weight is `(q - zero) * scale`, and
`qzeros` stores zero minus one (7 for the symmetric zero point 8): that is GPTQ's version 1 format.
AWQ packing (`auto_round:auto_awq`): `qweight` int32 `[in, out * b / 32]` packed along the output in the order
0, 2, 4, 6, 1, 3, 5, 7, `qzeros` likewise, zero points as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.writer import Computed
from requant.tasks.errors import CheckpointError

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
REQUIRED = ("qweight", "qzeros", "scales")
GPTQ_DTYPES = {"qweight": {"I32"}, "qzeros": {"I32"}, "g_idx": {"I32"}, "scales": {"F16", "BF16", "F32"}}
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
MIN_SCALE = 2.0**-20  # a scale that float16 still holds, for groups of zeros
STRIPE_ROWS = 512  # of a weight at a time; a multiple of 32, so that stripes end where words do
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NUMPY = {"I32": "<i4", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1", "I8": "i1"}

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PackingScheme:
    """How one module is packed. `group_size` -1 is one group a column of the whole input."""

    bits: int
    group_size: int
    packing: str = "gptq"  # gptq (stores zero - 1) | gptq_v2 (as is) | awq

    @classmethod
    def of(cls, quantization: Mapping[str, Any], module: str) -> PackingScheme:
        """The scheme of a module, from a checkpoint's quantization config and its exact `extra_config` entry.

        Raises CheckpointError for a method or packing that is not known here.
        """
        extra = quantization.get("extra_config") or {}
        own = extra.get(module, {}) if isinstance(extra, dict) else None
        if not isinstance(own, dict):
            raise CheckpointError(f"the extra_config of the quantization config is no mapping for {module}")
        bits: Any = own.get("bits", quantization.get("bits"))
        group_size: Any = own.get("group_size", quantization.get("group_size"))
        packing = _packing(quantization)
        known = bits == 4 if packing == "awq" else bits in (2, 3, 4, 8)
        if not known or type(group_size) is not int or not (group_size == -1 or group_size > 0):
            raise CheckpointError(f"the quantization config gives {module} bits={bits!r}, group_size={group_size!r}")
        return cls(bits, group_size, packing)

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """The shapes that the packed parts of a `[out, in]` weight must have."""
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
        """The `[out, in]` that packed parts stand for, told from the shapes of `scales` and `qweight`."""
        qweight, scales = parts["qweight"].shape, parts["scales"].shape
        if len(qweight) != 2 or len(scales) != 2:
            return ()
        return scales[1], qweight[0] if self.packing == "awq" else qweight[0] * 32 // self.bits


def _packing(quantization: Mapping[str, Any]) -> str:
    method = quantization.get("quant_method")
    packing = str(quantization.get("packing_format", "auto_round:auto_gptq" if method == "auto-round" else method))
    known = {
        "auto_round:auto_gptq": "gptq",
        "auto_round:gptqmodel": "gptq_v2",
        "auto_round": "gptq_v2",
        "auto_round:auto_awq": "awq",
        "gptq": "gptq",
        "awq": "awq",
    }
    if packing == "gptq" and quantization.get("checkpoint_format") == "gptq_v2":
        return "gptq_v2"
    if packing not in known:
        raise CheckpointError(f"packing {packing!r} of quant_method {method!r} is not known to Requant")
    return known[packing]


def check_parts(module: str, parts: Mapping[str, Tensor], scheme: PackingScheme, weight: tuple[int, ...]) -> str | None:
    """What is wrong with a module's packed parts for a weight of shape `[out, in]`, as a sentence, or None."""
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
    """Quantize a `[out, in]` weight by rounding to nearest, symmetrically, and pack it as its scheme says.

    `rows` are float32 stripes of it, from the top. The scale of a group is its largest magnitude over the largest
    integer; with 4 bits, CLIPPING of it, whichever has the least squared error. Raises CheckpointError where the sides
    do not divide into groups and words.
    """
    out_features, in_features = shape
    group = in_features if scheme.group_size == -1 else scheme.group_size
    words = 32 // scheme.bits
    if 32 % scheme.bits or in_features % group or in_features % words or out_features % words:
        raise CheckpointError(f"a weight of {out_features} x {in_features} cannot be packed with {scheme}")
    half = 1 << (scheme.bits - 1)
    integers = np.empty((in_features, out_features), np.uint8)
    scales = np.empty((in_features // group, out_features), np.float16)
    begin = 0
    for stripe in rows:
        end = begin + len(stripe)
        groups = stripe.reshape(-1, in_features // group, group)
        scale = _scales(groups, half)
        whole = np.clip(np.rint(groups / scale), -half, half - 1) + half
        integers[:, begin:end] = whole.reshape(end - begin, -1).T
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
    """The scale of each group `[rows, groups, 1]`, as float16 can hold it, with the least squared error."""
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
    """Unsigned integers to int32 words along `axis`, lowest bits first; for widths that divide 32."""
    each = 32 // bits
    words = sum(
        (values[number::each] if axis == 0 else values[:, number::each]).astype(np.uint32) << np.uint32(bits * number)
        for number in range(each)
    )
    return np.ascontiguousarray(words).view(np.int32)


def float_rows(tensor: Tensor) -> Iterator[Floats]:
    """A matrix as float32 stripes of STRIPE_ROWS rows, read one after the other."""
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
    """Read a tensor; BF16 becomes float32. Raises CheckpointError for a dtype that numpy has not."""
    if tensor.dtype != "BF16" and tensor.dtype not in NUMPY:
        raise CheckpointError(f"{tensor.name} has dtype {tensor.dtype}, which cannot be read here")
    return _values(tensor.read(), tensor.dtype).reshape(tensor.shape)


def _values(raw: bytes, dtype: str) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype=NUMPY[dtype])


def to_bytes(values: Array, dtype: str) -> bytes:
    """The bytes of an array as a safetensors dtype; BF16 by rounding float32 to nearest even."""
    if dtype != "BF16":
        return np.ascontiguousarray(values, dtype=NUMPY[dtype]).tobytes()
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2").tobytes()


def unpack(words: Array, bits: int, axis: int) -> Array:
    """int32 words to uint8 along `axis`, 0 or 1, lowest bits first. 3 bits run across word borders."""
    words = words.view(np.uint32)
    if 32 % bits == 0:
        each, shape = 32 // bits, list(words.shape)
        shape[axis] *= each
        values = np.empty(shape, np.uint8)
        for number in range(each):
            place = values[number::each] if axis == 0 else values[:, number::each]
            place[...] = (words >> np.uint32(bits * number)) & np.uint32((1 << bits) - 1)
        return values
    words = np.moveaxis(words, axis, -1)
    as_bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    grouped = as_bits.reshape(*words.shape[:-1], -1, bits)
    flat: Array = (grouped << np.arange(bits, dtype=np.uint8)).sum(-1).astype(np.uint8)
    return np.moveaxis(flat, -1, axis)


def dequantize(parts: Mapping[str, Tensor], scheme: PackingScheme) -> Floats:
    """The float32 `[out, in]` weight that the packed parts stand for."""
    stripes = list(dequantized_rows(parts, scheme))
    weight: Floats = np.concatenate(stripes) if stripes else np.empty((0, 0), np.float32)
    return weight


def dequantized_rows(parts: Mapping[str, Tensor], scheme: PackingScheme) -> Iterator[Floats]:
    """The same in stripes of STRIPE_ROWS rows, from the top: memory follows the packed parts."""
    qweight, qzeros = to_numpy(parts["qweight"]), to_numpy(parts["qzeros"])
    scales = to_numpy(parts["scales"])
    inputs = qweight.shape[0] if scheme.packing == "awq" else qweight.shape[0] * 32 // scheme.bits
    group = _groups(parts, scheme, inputs, len(scales))
    for begin in range(0, scales.shape[1], STRIPE_ROWS):
        end = min(begin + STRIPE_ROWS, scales.shape[1])
        words = slice(begin * scheme.bits // 32, end * scheme.bits // 32)
        if scheme.packing == "awq":
            values = _in_order(unpack(qweight[:, words], scheme.bits, 1))
        else:
            values = unpack(qweight[:, begin:end], scheme.bits, 0)
        zeros = _zero_points(qzeros[:, words], scheme)
        scale = scales[:, begin:end].astype(np.float32)
        weight: Floats = values.astype(np.float32)
        if group is None:  # equal groups, one after the other
            by_group = weight.reshape(len(scale), -1, weight.shape[1])
            by_group -= zeros[:, None].astype(np.float32)
            by_group *= scale[:, None]
        else:
            weight -= zeros[group].astype(np.float32)
            weight *= scale[group]
        yield np.ascontiguousarray(weight.T)


def zero_points(parts: Mapping[str, Tensor], scheme: PackingScheme) -> Array:
    """The zero points of packed parts as they are meant, uint8 `[groups, out]`."""
    return _zero_points(to_numpy(parts["qzeros"]), scheme)


def _zero_points(words: Array, scheme: PackingScheme) -> Array:
    zeros = unpack(words, scheme.bits, 1)
    if scheme.packing == "awq":
        return _in_order(zeros)
    return (zeros + 1) & ((1 << scheme.bits) - 1) if scheme.packing == "gptq" else zeros


def _groups(parts: Mapping[str, Tensor], scheme: PackingScheme, inputs: int, count: int) -> Array | None:
    """The group of each input, of `count` groups; None where they are equal and in order."""
    if "g_idx" not in parts and inputs == count * (inputs if scheme.group_size == -1 else scheme.group_size):
        return None
    if "g_idx" not in parts:
        return np.arange(inputs) // (inputs if scheme.group_size == -1 else scheme.group_size)
    group = to_numpy(parts["g_idx"])
    if len(group) != inputs or group.min() < 0 or group.max() >= count:
        raise CheckpointError(f"{parts['g_idx'].name} names groups that there are not")
    return group


def _in_order(values: Array) -> Array:
    """AWQ's integers along the output, as they were before packing."""
    return values.reshape(len(values), -1, len(AWQ_ORDER))[..., np.argsort(AWQ_ORDER)].reshape(len(values), -1)
