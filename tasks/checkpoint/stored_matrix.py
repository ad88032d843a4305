"""Finds quantized weight matrices, whatever method stored them: `(code - zero point) * scale`, in float32.

Here is what a matrix is made of, without torch. `dequantize.py` computes its weights.

The names and dtypes of the tensors say which format a matrix has:

    GPTQ, AWQ          see packing.py
    packed integers    `weight_packed` int32 `[out, words]`, unsigned codes of 1 to 8 bits, the lowest bits first; one
                       scale for each row or group, `weight_scale`; `weight_zero_point` int32 `[words, groups]`, packed
                       along the rows, without which the zero point is `2 ** (bits - 1)`; `weight_g_idx` int32 `[in]`.
                       Words have no unused bits, or, as compressed-tensors before 0.19 wrote them, `32 // bits` codes
    INT8               `weight` int8 `[out, in]`, `weight_scale`, `weight_zero_point` int8
    FP8, MXFP8         see fp8.py
    NVFP4              `weight_packed`, or ModelOpt's `weight`, uint8 `[out, in / 2]`: two E2M1 codes, the first in the
                       low bits; `weight_scale` FP8 `[out, in / 16]`, divided by `weight_global_scale`, or multiplied by
                       ModelOpt's `weight_scale_2`
    MXFP4              the same codes; `weight_scale` uint8 `[out, in / 32]`, exponents as in fp8.py

Sources: compressed-tensors 0.19.0 and 0.20.1, compressors/ (pack_quantized, naive_quantized, nvfp4, mxfp4); vLLM
0.32.0, model_executor/layers/quantization/modelopt.py and utils/nvfp4_emulation_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from requant.tasks.checkpoint import packing
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig
from requant.tasks.checkpoint.fp8 import FP8, Dequantized, block_of, scale_grid
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.methods import full_name
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.packing import Array, Floats, PackingScheme, to_numpy
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "E2M1": 6.0}
SCALES = ("weight_scale", "weight_scale_inv")
OVERALL_SCALES = {"weight_global_scale", "weight_scale_2"}  # compressed-tensors divides by its own, ModelOpt multiplies


Layout = Literal["dense", "columns", "loose", "loose_columns", "awq", "awq_columns", "int8", "float8", "e2m1"]


@dataclass(frozen=True)
class Codes:
    """The codes of a matrix `[rows, count]`, as they lie in a tensor.

    layout: how they lie in int32 words, from the lowest bits of a word on:

        dense          `[rows, words]`; words have no unused bits, so that a code may lie in two of them
        columns        `[words, rows]`, otherwise as dense
        loose          `[rows, words]`, `32 // bits` codes in a word
        loose_columns  `[words, rows]`, otherwise as loose
        awq            `[rows, words]`, 8 codes in a word, in the order of AWQ
        awq_columns    `[count, words]`, 8 codes of one column in a word, in the order of AWQ

    or in bytes: int8 `[rows, count]`, whose codes are 128 larger; float8, an FP8 dtype; e2m1 `[rows, count / 2]`.
    offset: what is added to unsigned codes, modulo `2 ** bits`.
    """

    tensor: Tensor
    layout: Layout
    bits: int
    count: int
    offset: int = 0


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized weight matrix `[out, in]`.

    scales: float32 `[groups, out]`; group: the group of each input, integers `[in]`.
    zeros: the zero points of unsigned codes, uint8 `[groups, out]`, or their codes; None for floating-point codes.
    step: the mean distance of two codes from zero to the largest one, in scales; 1 for integers.
    """

    bits: int
    shape: tuple[int, int]
    codes: Codes
    scales: Floats
    group: Array
    zeros: Array | Codes | None
    step: float = 1.0


def quantized_module(checkpoint: Checkpoint, name: str) -> Module | None:
    """Return the module that holds the quantized matrix of a weight of the base, by the weight's name, if one does."""
    module_name, _, part = name.rpartition(".")
    module = checkpoint.modules.get(module_name)
    if part != "weight" or module is None or not module.quantized:
        return None
    by_its_name = module.storage in ("scaled", "other")
    return module if module.has_weight and (by_its_name or name not in checkpoint.tensors) else None


def is_plain_fp8(checkpoint: Checkpoint, module: Module) -> bool:
    """Check whether `dequantized_tensors` of fp8.py can read a module, which knows no blocks of compressed-tensors."""
    weight = module.parts.get("weight")
    by_shapes = block_structure(checkpoint.quantization) is None or checkpoint.config.fp8_block is not None
    return module.storage == "scaled" and weight is not None and weight.dtype in FP8 and by_shapes


def problem_of(checkpoint: Checkpoint, module: Module, weight: tuple[int, ...]) -> str | None:
    """Return why a quantized module does not hold a weight `[out, in]` as the config says, as a sentence."""
    try:
        matrix_of(checkpoint, module, weight)
    except CheckpointError as error:
        return str(error)
    if checkpoint.method is None:
        return f"{module.name} is quantized, and no config says how: add the quantization_config to config.json"
    contradiction = checkpoint.reading.contradiction(module)
    return None if contradiction is None else str(contradiction)


def matrix_of(checkpoint: Checkpoint, module: Module, weight: tuple[int, ...]) -> StoredMatrix:
    """Read the matrix of a weight `[out, in]`. Raises CheckpointError if the module does not hold such a matrix.

    GPTQ's and AWQ's version of the format is only in the config, so that a matrix that contradicts it is refused.
    """
    if module.storage == "integer" and (wrong := checkpoint.reading.problem(module, weight)):
        raise CheckpointError(wrong)
    matrix = stored_matrix(checkpoint, module)
    if matrix.shape != weight:
        raise CheckpointError(f"{module.name} holds a matrix of shape {matrix.shape}, the base's has {weight}")
    return matrix


def stored_matrix(checkpoint: Checkpoint, module: Module, scale_dtype: str | None = None) -> StoredMatrix:
    """Read the scales of a quantized module, and prepare to read its matrix.

    With `scale_dtype`, the scales of packed integers are rounded to this dtype of safetensors. Raises CheckpointError
    for a format that Requant does not know, and for tensors that do not fit each other.
    """
    if unknown := unknown_format(checkpoint, module):
        raise CheckpointError(unknown)
    if module.storage == "integer":
        return _of_packing(checkpoint, module, scale_dtype)
    weight = module.parts.get("weight_packed") or module.parts.get("weight")
    if module.storage == "plain" or weight is None or len(weight.shape) != 2:
        raise CheckpointError(f"{module.name} holds no quantized matrix")
    if weight.dtype == "I32":
        return _of_words(checkpoint, module, weight, scale_dtype)
    if weight.dtype == "I8":
        return _of_bytes(module, weight)
    if weight.dtype in FP8:
        return _of_floats(module, weight, weight.dtype, _stated_block(checkpoint))
    return _of_floats(module, weight, "E2M1", None)


def unknown_format(checkpoint: Checkpoint, module: Module) -> str | None:
    """Return why Requant has no formula for a quantized module, as a sentence; None if it has one."""
    if module.storage == "other":
        name = shown(full_name(checkpoint.method, checkpoint.quantization)) if checkpoint.method else "nobody says what"
        return f"{module.name} is stored as {name}, which Requant cannot dequantize"
    if module.storage in ("compressed", "scaled") and checkpoint.quantization.get("transform_config"):
        return f"the weight of {module.name} is rotated (transform_config), which Requant cannot undo"
    if module.storage not in ("compressed", "scaled"):
        return None
    packed = module.parts.get("weight_packed")
    weight = packed or module.parts.get("weight")
    if packed is not None:
        known = packed.dtype in ("I32", "U8")
    else:
        known = weight is None or weight.dtype in {"I8", *FP8} or "weight_scale_2" in module.parts
    if known or weight is None:
        return None
    return f"{module.name} is stored as {weight.dtype} in a way that Requant does not know"


def _of_packing(checkpoint: Checkpoint, module: Module, scale_dtype: str | None) -> StoredMatrix:
    """Read a matrix that GPTQ or AWQ packed."""
    return packed_matrix(module.packed_parts, checkpoint.reading.scheme(module), module.name, scale_dtype)


def packed_matrix(
    parts: Mapping[str, Tensor], scheme: PackingScheme, name: str, scale_dtype: str | None = None
) -> StoredMatrix:
    """Read a matrix that GPTQ or AWQ packed, of the module `name`. Raises as `stored_matrix` does."""
    shape = scheme.weight_shape(parts) if {"qweight", "scales"} <= parts.keys() else ()
    if wrong := packing.check_parts(name, parts, scheme, shape or (1, 1)):
        raise CheckpointError(wrong)
    out_features, inputs = shape
    scales = packing.scales_of(parts, scale_dtype)
    group: Array = np.arange(inputs) // (inputs if scheme.group_size == -1 else scheme.group_size)
    if "g_idx" in parts:
        group = to_numpy(parts["g_idx"])
        if group.min(initial=0) < 0 or group.max(initial=0) >= len(scales):
            raise CheckpointError(f"{parts['g_idx'].name} names groups that there are not: make it again")
    awq = scheme.packing == "awq"
    zeros = Codes(parts["qzeros"], "awq" if awq else "dense", scheme.bits, out_features, int(scheme.packing == "gptq"))
    codes = Codes(parts["qweight"], "awq_columns" if awq else "columns", scheme.bits, inputs)
    return StoredMatrix(scheme.bits, (out_features, inputs), codes, scales, group, zeros)


def _of_words(checkpoint: Checkpoint, module: Module, weight: Tensor, scale_dtype: str | None) -> StoredMatrix:
    """Read integers that compressed-tensors packed into words."""
    rows, words = weight.shape
    stated = module.parts.get("weight_shape")
    if stated is None or stated.shape != (2,) or stated.dtype not in ("I64", "I32"):
        raise CheckpointError(f"{module.name}.weight_shape, two integers, is missing: make it again")
    out_features, inputs = (int(side) for side in to_numpy(stated))
    bits, dense = _width(checkpoint.reading.bits(module), inputs, words)
    if not bits or out_features != rows:
        raise CheckpointError(
            f"{weight.name} has shape {weight.shape}, which cannot hold a matrix of {out_features} x {inputs}"
        )
    scales, group = _scales(module, (rows, inputs), scale_dtype)
    layout: Layout = "dense" if dense else "loose"
    zeros: Array | Codes = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    if (packed := module.parts.get("weight_zero_point")) is not None:
        stated_words = (packed.shape[0], math.prod(packed.shape[1:])) if packed.shape else ()
        if packed.dtype != "I32" or stated_words != (_words_for(rows, bits, dense), len(scales)):
            raise CheckpointError(f"{packed.name} ({packed.dtype} {list(packed.shape)}) does not fit {weight.name}")
        zeros = Codes(replace(packed, shape=stated_words), "columns" if dense else "loose_columns", bits, rows)
    return StoredMatrix(bits, (rows, inputs), Codes(weight, layout, bits, inputs), scales, group, zeros)


def _of_bytes(module: Module, weight: Tensor) -> StoredMatrix:
    """Read 8-bit integers."""
    rows, inputs = weight.shape
    scales, group = _scales(module, (rows, inputs))
    zeros = np.full(scales.shape, 128, np.uint8)
    if (stated := module.parts.get("weight_zero_point")) is not None:
        if stated.dtype != "I8" or math.prod(stated.shape) not in (1, scales.size):
            raise CheckpointError(f"{stated.name} ({stated.dtype} {list(stated.shape)}) does not fit {weight.name}")
        signed = to_numpy(stated).astype(np.int16)
        zeros = np.broadcast_to((signed.reshape(-1, len(scales)).T if signed.size > 1 else signed) + 128, scales.shape)
        zeros = zeros.astype(np.uint8)
    return StoredMatrix(8, (rows, inputs), Codes(weight, "int8", 8, inputs), scales, group, zeros)


def _of_floats(module: Module, weight: Tensor, kind: str, block: tuple[int, int] | None) -> StoredMatrix:
    """Read codes of an FP8 dtype, one in a byte, or of E2M1, two in a byte."""
    rows, width = weight.shape
    inputs = 2 * width if kind == "E2M1" else width
    scales, group = _scales(module, (rows, inputs), block=block)
    bits = 4 if kind == "E2M1" else 8
    in_pairs = kind == "E2M1"
    codes = Codes(replace(weight, dtype="U8") if in_pairs else weight, "e2m1" if in_pairs else "float8", bits, inputs)
    step = LARGEST[kind] / ((1 << (bits - 1)) - 1)
    return StoredMatrix(bits, (rows, inputs), codes, scales, group, None, step)


def matrices_of_fp8(tensor: Dequantized) -> Iterator[StoredMatrix]:
    """Yield the matrices of an FP8 weight, of which fused experts have many."""
    weight, (high, wide) = tensor.weight, tensor.block
    *_, rows, inputs = weight.shape
    for number in range(math.prod(weight.shape[:-2])):
        first = weight.begin + number * rows * inputs
        part = replace(weight, shape=(rows, inputs), begin=first, end=first + rows * inputs)
        scales = np.repeat(scale_grid(tensor.scale, weight.shape, number), high, axis=0)[:rows].T
        yield StoredMatrix(8, (rows, inputs), Codes(part, "float8", 8, inputs), scales, np.arange(inputs) // wide, None)


def _scales(
    module: Module,
    shape: tuple[int, int],
    scale_dtype: str | None = None,
    block: tuple[int, int] | None = None,
) -> tuple[Floats, Array]:
    """Return the scales, float32 `[groups, out]`, and the group of each input.

    `block`: the rows and columns that share a scale, where the config says so.
    """
    rows, inputs = shape
    scale = next((module.parts[part] for part in SCALES if part in module.parts), None)
    if scale is None:
        raise CheckpointError(f"{module.name}.weight_scale is missing beside its weight: make it again")
    high, wide = block_of(f"{module.name}.weight", shape, scale, block)
    grid = scale_grid(scale, shape)
    if scale_dtype is not None and scale.dtype in ("F16", "BF16", "F32"):
        grid = packing.rounded_to(grid, scale_dtype)
    grid = (grid * _overall(module)).astype(np.float32)
    scales: Floats = np.repeat(grid, high, axis=0)[:rows].T
    group: Array = np.arange(inputs) // wide
    if (stated := module.parts.get("weight_g_idx")) is not None:
        group = to_numpy(stated) if stated.dtype in ("I32", "I64") else np.empty(0, np.int32)
        if group.shape != (inputs,) or group.min() < 0 or group.max() >= len(scales):
            raise CheckpointError(f"{stated.name} names groups that there are not: make it again")
    return scales, group


def _overall(module: Module) -> float:
    """Return the factor of all scales of a module, which NVFP4 has. Raises CheckpointError if it is no factor."""
    factor = 1.0
    for part in OVERALL_SCALES & module.parts.keys():
        tensor = module.parts[part]
        value = float(to_numpy(tensor).reshape(-1)[0]) if math.prod(tensor.shape) == 1 else 0.0
        if not value > 0 or not math.isfinite(value):
            raise CheckpointError(f"{tensor.name} is no number above 0: make it again")
        factor *= 1 / value if part == "weight_global_scale" else value
    return factor


def _stated_block(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Return the rows and columns that share one FP8 scale, where the config says so."""
    return checkpoint.config.fp8_block or block_structure(checkpoint.quantization)


def block_structure(quantization: QuantizationConfig) -> tuple[int, int] | None:
    """Return the one size of blocks that a config of compressed-tensors names; None if it names none, or several."""
    groups = (quantization.child("config_groups") or JsonObject()).values()
    weights = (group.get("weights") for group in groups if isinstance(group, dict))
    sizes = [w.get("block_structure") for w in weights if isinstance(w, dict) and w.get("block_structure")]
    if not sizes or any(size != sizes[0] for size in sizes) or not isinstance(sizes[0], list) or len(sizes[0]) != 2:
        return None
    high, wide = sizes[0]
    return (high, wide) if type(high) is type(wide) is int and high > 0 and wide > 0 else None


def _width(stated: int | None, inputs: int, words: int) -> tuple[int, bool]:
    """Return the bits of codes, `inputs` of which lie in so many words, and whether words have no unused bits.

    Several widths may fit a narrow matrix; the one that the config states is tried first. 0 if none fits.
    """
    for bits in ([stated] if stated and stated <= 8 else []) + list(range(1, 9)):
        for dense in (True, False):
            if _words_for(inputs, bits, dense) == words:
                return bits, dense
    return 0, True


def _words_for(count: int, bits: int, dense: bool) -> int:
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))
