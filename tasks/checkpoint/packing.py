"""Packed integer weights: shapes, and back to real values, with numpy alone.

GPTQ packing (auto-round's `auto_round:auto_gptq`, AutoGPTQ): for `bits` b and `32 / b` values a word,
`qweight` int32 `[in * b / 32, out]` packs along the input, `qzeros` int32 `[in / group, out * b / 32]` along the
output, `scales` fp16 `[in / group, out]`, optional `g_idx` int32 `[in]`. The weight is `(q - zero) * scale`, and
`qzeros` stores zero minus one (7 for the symmetric zero point 8): that is GPTQ's version 1 format.
AWQ packing (`auto_round:auto_awq`): `qweight` int32 `[in, out * b / 32]` packed along the output in the order
0, 2, 4, 6, 1, 3, 5, 7, `qzeros` likewise, zero points as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.checkpoint.header import Tensor
from tasks.errors import CheckpointError

PARTS = ("qweight", "qzeros", "scales", "g_idx")
REQUIRED = ("qweight", "qzeros", "scales")
DTYPES = {"qweight": {"I32"}, "qzeros": {"I32"}, "g_idx": {"I32"}, "scales": {"F16", "BF16", "F32"}}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NUMPY = {"I32": "<i4", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1", "I8": "i1"}

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scheme:
    """How one module is packed. `group_size` -1 is one group a column of the whole input."""

    bits: int
    group_size: int
    packing: str = "gptq"  # gptq (stores zero - 1) | gptq_v2 (as is) | awq

    @classmethod
    def of(cls, quantization: Mapping[str, Any], module: str) -> Scheme:
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


def check_parts(module: str, parts: Mapping[str, Tensor], scheme: Scheme, weight: tuple[int, ...]) -> str | None:
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
        if tensor.dtype not in DTYPES[part]:
            return f"{module}.{part} has dtype {tensor.dtype}, packed are {' or '.join(sorted(DTYPES[part]))}"
    return None


def to_numpy(tensor: Tensor) -> Array:
    """Read a tensor; BF16 becomes float32. Raises CheckpointError for a dtype that numpy has not."""
    if tensor.dtype == "BF16":
        wide = np.frombuffer(tensor.read(), dtype="<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    if tensor.dtype not in NUMPY:
        raise CheckpointError(f"{tensor.name} has dtype {tensor.dtype}, which cannot be read here")
    return np.frombuffer(tensor.read(), dtype=NUMPY[tensor.dtype]).reshape(tensor.shape)


def unpack(words: Array, bits: int, axis: int) -> Array:
    """int32 words to unsigned integers along `axis`, lowest bits first. 3 bits run across word borders."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        values = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
        flat = values.reshape(*words.shape[:-1], -1)
    else:
        as_bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
        grouped = as_bits.reshape(*words.shape[:-1], -1, bits)
        flat = (grouped << np.arange(bits, dtype=np.uint8)).sum(-1)
    return np.moveaxis(flat, -1, axis).astype(np.int32)


def dequantize(parts: Mapping[str, Tensor], scheme: Scheme) -> Floats:
    """The float32 `[out, in]` weight that the packed parts stand for."""
    qweight, qzeros = to_numpy(parts["qweight"]), to_numpy(parts["qzeros"])
    scales = to_numpy(parts["scales"]).astype(np.float32)
    if scheme.packing == "awq":
        order = np.argsort(AWQ_ORDER)
        values = unpack(qweight, scheme.bits, 1).reshape(qweight.shape[0], -1, 8)[..., order]
        values = values.reshape(qweight.shape[0], -1)
        zeros = unpack(qzeros, scheme.bits, 1).reshape(qzeros.shape[0], -1, 8)[..., order].reshape(qzeros.shape[0], -1)
    else:
        values = unpack(qweight, scheme.bits, 0)
        zeros = unpack(qzeros, scheme.bits, 1)
        if scheme.packing == "gptq":
            zeros = (zeros + 1) & ((1 << scheme.bits) - 1)
    rows = values.shape[0]
    if "g_idx" in parts:
        group = to_numpy(parts["g_idx"])
        if len(group) != rows or group.min() < 0 or group.max() >= len(scales):
            raise CheckpointError(f"{parts['g_idx'].name} names groups that there are not")
    else:
        group = np.arange(rows) // (rows if scheme.group_size == -1 else scheme.group_size)
    weight: Floats = ((values - zeros[group]) * scales[group]).T.astype(np.float32)
    return weight
