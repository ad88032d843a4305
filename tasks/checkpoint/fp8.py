"""FP8 checkpoints (Qwen's and DeepSeek's `-FP8`) read as the BF16 ones that they stand for, with numpy alone.

An FP8 weight has a scale for each block of it: `weight_scale_inv` `[rows / block, columns / block]` beside `weight`, or
`gate_up_proj_scale_inv` beside fused experts; a single scale, or one a row, are blocks too. The weight is `fp8 * scale`
in float32, rounded to BF16: transformers' `Fp8Dequantize`, DeepSeek-V3's `weight_dequant`.

auto-round's config has no words for FP8 tensors, so what is made of such a base holds BF16 where nothing is packed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from requant.tasks.checkpoint.checkpoint import INDEX, Checkpoint
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.packing import STRIPE_ROWS, to_bytes, to_numpy
from requant.tasks.checkpoint.writer import Computed, index_of, place_shard, split_into_shards, write_json
from requant.tasks.errors import CheckpointError

FP8 = {"F8_E4M3", "F8_E5M2"}
WEIGHT_SCALE_SUFFIXES = ("_scale_inv", "_scale")
# Scales of the activations, which only FP8 kernels read.
OF_ACTIVATIONS = ("activation_scale", "input_scale")

Floats = npt.NDArray[np.float32]


def is_fp8(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.dtype in FP8 for tensor in tensors)


def dequantize_fp8(checkpoint: Checkpoint) -> Checkpoint:
    """Put BF16 weights in place of FP8 ones, computed when they are read, and drop scales and quantization config.

    Returns the same checkpoint where nothing is FP8. Raises CheckpointError as `dequantized_tensors`.
    """
    if not is_fp8(checkpoint.tensors.values()):
        return checkpoint
    tensors = dequantized_tensors(checkpoint.tensors.values(), checkpoint.config)
    config = _without_quantization(checkpoint.config)
    return replace(checkpoint, config=config, tensors={t.name: t for t in tensors}, total_size=None)


def dequantized_tensors(tensors: Iterable[Tensor], config: Mapping[str, Any]) -> list[Tensor]:
    """The tensors, FP8 ones as BF16 and their scales left out. `config` is the checkpoint's.

    Raises CheckpointError for an FP8 weight without a scale that fits it.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    if not is_fp8(by_name.values()):
        return list(by_name.values())
    size = block_size(config)
    left_out: set[str] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in by_name.items():
        if tensor.dtype not in FP8:
            continue
        scale = next((by_name[name + end] for end in WEIGHT_SCALE_SUFFIXES if name + end in by_name), None)
        if scale is None:
            raise CheckpointError(
                f"{name} is {tensor.dtype} and has no {name}{WEIGHT_SCALE_SUFFIXES[0]}: use a complete base"
            )
        block = _block(tensor, scale, size)
        compute = functools.partial(_pieces, tensor, scale, block)
        found[name] = Computed.of(name, "BF16", tensor.shape, compute)
        module = name.rpartition(".")[0]
        left_out |= {scale.name, *(f"{module}.{part}" for part in OF_ACTIVATIONS)}
    return [found.get(name, tensor) for name, tensor in by_name.items() if name not in left_out]


def write_dequantized(checkpoint: Checkpoint, out: Path) -> Path:
    """Write the BF16 checkpoint that an FP8 one stands for, its other files as links. What is complete stays."""
    if (out / INDEX).exists():
        return out
    out.mkdir(exist_ok=True)
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in {"config.json", INDEX}:
            (out / path.name).unlink(missing_ok=True)
            (out / path.name).symlink_to(path)
    same = dequantize_fp8(checkpoint)
    write_json(out, "config.json", same.config)
    layout = split_into_shards(same.tensors.values())
    for shard, tensors in layout.items():
        place_shard(out, shard, tensors)
    write_json(out, INDEX, index_of(layout))
    return out


def dequantized_rows(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Iterator[Floats]:
    """Yield a float32 weight `[rows, columns]` in stripes of at most STRIPE_ROWS rows, a 3-D one matrix by
    matrix."""
    table, columns = values_of(weight.dtype), weight.shape[-1]
    high, wide = block
    for matrix in range(math.prod(weight.shape[:-2])):
        grid = _grid(scale, weight.shape, matrix)
        for begin in range(0, weight.shape[-2], STRIPE_ROWS):
            end = min(begin + STRIPE_ROWS, weight.shape[-2])
            first = weight.begin + (matrix * weight.shape[-2] + begin) * columns
            part = replace(weight, dtype="U8", begin=first, end=first + (end - begin) * columns)
            codes = to_numpy(replace(part, shape=(end - begin, columns)))
            by_row = grid[np.arange(begin, end) // high]
            yield table[codes] * np.repeat(by_row, wide, axis=1)[:, :columns]


def _pieces(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Iterator[bytes]:
    return (to_bytes(rows, "BF16") for rows in dequantized_rows(weight, scale, block))


@functools.cache
def values_of(dtype: str) -> Floats:
    """The 256 values of an FP8 dtype by their bits. E4M3 (fn): bias 7, no infinities; E5M2: the upper half of float16.

    Micikevicius et al., FP8 Formats for Deep Learning, 2022.
    """
    bits = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (bits << 8).view(np.float16).astype(np.float32)
    exponent, mantissa = (bits >> 3 & 15).astype(np.int32), (bits & 7).astype(np.float32)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    values = np.where(bits & 127 == 127, np.nan, values)
    signed: Floats = np.where(bits & 128, -values, values).astype(np.float32)
    return signed


def _block(weight: Tensor, scale: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that one scale is for. Told from the scale's shape; the config's size where blocks at the edges
    are smaller. Raises CheckpointError where neither fits."""
    if len(weight.shape) < 2:
        raise CheckpointError(f"{weight.name} is {weight.dtype} and no matrix: use the base that it was made of")
    rows, columns = weight.shape[-2:]
    down, across = _grid_shape(scale, weight.shape)
    if size is not None and (down, across) == (-(-rows // size[0]), -(-columns // size[1])):
        return size
    if scale.dtype in {"F32", "BF16", "F16", "U8", "F8_E8M0"} and down and across:
        leading = math.prod(scale.shape) == math.prod(weight.shape[:-2]) * down * across
        if leading and not rows % down and not columns % across:
            return rows // down, columns // across
    raise CheckpointError(
        f"{scale.name} ({scale.dtype} {list(scale.shape)}) does not fit {weight.name} {list(weight.shape)}: "
        "use a complete base"
    )


def _grid_shape(scale: Tensor, weight: tuple[int, ...]) -> tuple[int, int]:
    """Scales down and across one matrix: `[]` and `[1]` are one for all, `[rows]` one a row."""
    if len(scale.shape) >= 2 and len(scale.shape) == len(weight):
        return scale.shape[-2], scale.shape[-1]
    count = math.prod(scale.shape)
    return (count, 1) if len(weight) == 2 and count in {1, weight[0]} else (0, 0)


def _grid(scale: Tensor, weight: tuple[int, ...], matrix: int) -> Floats:
    """The scales `[down, across]` float32 of one matrix. Bytes are exponents: `2 ** (byte - 127)` (E8M0)."""
    down, across = _grid_shape(scale, weight)
    exponents = scale.dtype in {"U8", "F8_E8M0"}
    values = to_numpy(replace(scale, dtype="U8") if exponents else scale).reshape(-1, down, across)[matrix]
    grid: Floats = values.astype(np.float32)
    if exponents:
        grid = np.exp2(grid - 127)
    return grid


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that one FP8 scale is for, if a config says."""
    for part in (config, config.get("text_config")):
        quantization = part.get("quantization_config") if isinstance(part, Mapping) else None
        size = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
        if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
            return size[0], size[1]
    return None


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    bare = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(bare.get("text_config"), dict):
        bare["text_config"] = {k: v for k, v in bare["text_config"].items() if k != "quantization_config"}
    return bare
