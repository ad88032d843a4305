"""Reads quantized weight matrices, whatever method stored them: `(code - zero point) * scale`, in float32.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from requant.tasks.checkpoint import packing
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig
from requant.tasks.checkpoint.fp8 import FP8, block_of, scale_grid, values_of
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.methods import full_name
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.packing import STRIPE_ROWS, Array, Floats, to_numpy
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])  # the values of 4 bits, the highest of which is the sign
LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "E2M1": 6.0}
SCALES = ("weight_scale", "weight_scale_inv")
OVERALL_SCALES = {"weight_global_scale", "weight_scale_2"}  # compressed-tensors divides by its own, ModelOpt multiplies


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized weight matrix `[out, in]`.

    scales: float32 `[groups, out]`; group: the group of each input, integers `[in]`.
    zeros: the zero points of unsigned codes, uint8 `[groups, out]`; None for floating-point codes.
    step: the mean distance of two codes from zero to the largest one, in scales; 1 for integers.
    rows: yields the weight as float32 stripes of at most STRIPE_ROWS rows, from the top.
    """

    bits: int
    shape: tuple[int, int]
    scales: Floats
    group: Array
    zeros: Array | None
    rows: Callable[[], Iterator[Floats]]
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
    parts, scheme = module.packed_parts, checkpoint.reading.scheme(module)
    shape = scheme.weight_shape(parts) if {"qweight", "scales"} <= parts.keys() else ()
    if wrong := packing.check_parts(module.name, parts, scheme, shape or (1, 1)):
        raise CheckpointError(wrong)
    out_features, inputs = shape
    scales = packing.scales_of(parts, scale_dtype)
    if "g_idx" in parts:
        group = to_numpy(parts["g_idx"])
    else:
        group = np.arange(inputs) // (inputs if scheme.group_size == -1 else scheme.group_size)
    return StoredMatrix(
        bits=scheme.bits,
        shape=(out_features, inputs),
        scales=scales,
        group=group,
        zeros=packing.zero_points(parts, scheme),
        rows=partial(packing.dequantized_rows, parts, scheme, scale_dtype),
    )


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
    zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    if (packed := module.parts.get("weight_zero_point")) is not None:
        columns = to_numpy(packed).reshape(packed.shape[0], -1).T if packed.dtype == "I32" else None
        if columns is None or columns.shape != (len(scales), _words_for(rows, bits, dense)):
            raise CheckpointError(f"{packed.name} ({packed.dtype} {list(packed.shape)}) does not fit {weight.name}")
        zeros = _unpack(columns, bits, rows, dense)

    def codes(stripe: Tensor) -> Floats:
        return _unpack(to_numpy(stripe), bits, inputs, dense).astype(np.float32)

    return _matrix(bits, (rows, inputs), (scales, group), zeros, partial(_stripes, weight, codes))


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

    def codes(stripe: Tensor) -> Floats:
        return to_numpy(stripe).astype(np.float32) + 128

    return _matrix(8, (rows, inputs), (scales, group), zeros, partial(_stripes, weight, codes))


def _of_floats(module: Module, weight: Tensor, kind: str, block: tuple[int, int] | None) -> StoredMatrix:
    """Read codes of an FP8 dtype, one in a byte, or of E2M1, two in a byte."""
    rows, width = weight.shape
    inputs = 2 * width if kind == "E2M1" else width
    scales, group = _scales(module, (rows, inputs), block=block)
    table = E2M1 if kind == "E2M1" else values_of(kind)

    def codes(stripe: Tensor) -> Floats:
        raw = to_numpy(replace(stripe, dtype="U8"))
        if kind == "E2M1":
            raw = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
        values: Floats = table[raw]
        return values

    bits = 4 if kind == "E2M1" else 8
    step = LARGEST[kind] / ((1 << (bits - 1)) - 1)
    return _matrix(bits, (rows, inputs), (scales, group), None, partial(_stripes, weight, codes), step)


def _matrix(
    bits: int,
    shape: tuple[int, int],
    scaling: tuple[Floats, Array],
    zeros: Array | None,
    stripes: Callable[[], Iterator[Floats]],
    step: float = 1.0,
) -> StoredMatrix:
    """Make a matrix of stripes of codes. `scaling`: the scales, and the group of each input."""
    scales, group = scaling

    def rows() -> Iterator[Floats]:
        begin = 0
        for codes in stripes():
            end = begin + len(codes)
            if zeros is not None:
                codes = codes - zeros[:, begin:end].T[:, group]
            weight: Floats = codes * scales[:, begin:end].T[:, group]
            yield weight
            begin = end

    return StoredMatrix(bits, shape, scales, group, zeros, rows, step)


def _stripes(weight: Tensor, codes: Callable[[Tensor], Floats]) -> Iterator[Floats]:
    """Yield the codes of a matrix `[out, ...]`, as float32 `[at most STRIPE_ROWS, in]`."""
    count, width = weight.shape
    row_bytes = weight.nbytes // max(count, 1)
    for begin in range(0, count, STRIPE_ROWS):
        end = min(begin + STRIPE_ROWS, count)
        first, last = (weight.begin + row * row_bytes for row in (begin, end))
        yield codes(replace(weight, shape=(end - begin, width), begin=first, end=last))


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


def _unpack(words: Array, bits: int, count: int, dense: bool) -> Array:
    """Unpack int32 words `[rows, words]` to uint8 `[rows, count]`, the lowest bits first."""
    raw = np.ascontiguousarray(words).view(np.uint32).astype("<u4").view(np.uint8)
    as_bits = np.unpackbits(raw, axis=-1, bitorder="little")
    if dense:
        as_bits = as_bits[:, : count * bits]
    else:
        by_word = as_bits.reshape(len(words), -1, 32)[..., : 32 // bits * bits]
        as_bits = by_word.reshape(len(words), -1)[:, : count * bits]
    flat: Array = (as_bits.reshape(len(words), count, bits) << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    return flat
