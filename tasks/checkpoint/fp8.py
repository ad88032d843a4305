"""Dequantizes FP8 checkpoints, such as Qwen's and DeepSeek's `-FP8`, to BF16.

The bytes of a tensor are computed with numpy alone; `dequantize.py` computes the same with torch.

Each block of an FP8 weight has a scale. The tensor `weight_scale_inv`, or `gate_up_proj_scale_inv` for fused experts,
has the shape `[rows / block rows, columns / block columns]`. A single scale, and one scale for each row, are handled as
large blocks. The weight is `fp8 * scale` in float32, rounded to BF16, as in transformers' `Fp8Dequantize` and
DeepSeek-V3's `weight_dequant`.

A config of auto-round cannot describe FP8 tensors. Therefore a checkpoint that is made of an FP8 base holds BF16
wherever it is not quantized.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from requant.tasks.checkpoint.checkpoint import INDEX, Checkpoint
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.packing import STRIPE_ROWS, to_bytes, to_numpy
from requant.tasks.checkpoint.writer import Computed, index_of, place_shard, split_into_shards, write_json
from requant.tasks.errors import CheckpointError

FP8 = {"F8_E4M3", "F8_E5M2"}
SCALE_DTYPES = {"F32", "BF16", "F16", "U8", "F8_E8M0", *FP8}
WEIGHT_SCALE_SUFFIXES = ("_scale_inv", "_scale")
ACTIVATION_SCALES = ("activation_scale", "input_scale")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Dequantized(Computed):
    """An FP8 weight as BF16. `block`: the rows and columns that share one value of `scale`."""

    weight: Tensor
    scale: Tensor
    block: tuple[int, int]


def is_fp8(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.dtype in FP8 for tensor in tensors)


def dequantize_fp8(checkpoint: Checkpoint) -> Checkpoint:
    """Replace FP8 weights by BF16 ones that are computed when they are read, and drop scales and quantization config.

    Returns the same checkpoint if it has no FP8 tensor. Raises CheckpointError as `dequantized_tensors` does.
    """
    if not is_fp8(checkpoint.tensors.values()):
        return checkpoint
    tensors = dequantized_tensors(checkpoint.tensors.values(), checkpoint.config)
    config = checkpoint.config.without_quantization()
    return replace(checkpoint, config=config, tensors={t.name: t for t in tensors}, total_size=None)


def dequantized_tensors(tensors: Iterable[Tensor], config: ModelConfig) -> list[Tensor]:
    """Return the tensors with FP8 weights as BF16, and without their scales.

    Raises CheckpointError for an FP8 weight without a scale that fits it.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    if not is_fp8(by_name.values()):
        return list(by_name.values())
    stated_block = config.fp8_block
    left_out: set[str] = set()
    dequantized: dict[str, Tensor] = {}
    for name, tensor in by_name.items():
        if tensor.dtype not in FP8:
            continue
        scale = next((by_name[name + end] for end in WEIGHT_SCALE_SUFFIXES if name + end in by_name), None)
        if scale is None:
            raise CheckpointError(
                f"{name} is {tensor.dtype} and has no {name}{WEIGHT_SCALE_SUFFIXES[0]}: use a complete base"
            )
        block = _block(tensor, scale, stated_block)
        compute = functools.partial(_pieces, tensor, scale, block)
        nbytes = 2 * math.prod(tensor.shape)
        dequantized[name] = Dequantized(name, "BF16", tensor.shape, Path(), 0, nbytes, compute, tensor, scale, block)
        module = name.rpartition(".")[0]
        left_out |= {scale.name, *(f"{module}.{part}" for part in ACTIVATION_SCALES)}
    return [dequantized.get(name, tensor) for name, tensor in by_name.items() if name not in left_out]


def write_dequantized(checkpoint: Checkpoint, out: Path) -> Path:
    """Write an FP8 checkpoint as BF16 to the folder `out`, with links to its other files.

    Does nothing if `out` is complete already.
    """
    if (out / INDEX).exists():
        return out
    out.mkdir(exist_ok=True)
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in {"config.json", INDEX}:
            (out / path.name).unlink(missing_ok=True)
            (out / path.name).symlink_to(path)
    dequantized = dequantize_fp8(checkpoint)
    write_json(out, "config.json", dequantized.config)
    layout = split_into_shards(dequantized.tensors.values())
    for shard, tensors in layout.items():
        place_shard(out, shard, tensors)
    write_json(out, INDEX, index_of(layout))
    return out


def dequantized_rows(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Iterator[Floats]:
    """Yield a weight as float32 stripes `[at most STRIPE_ROWS, columns]`, a 3-D weight matrix by matrix."""
    table, columns = values_of(weight.dtype), weight.shape[-1]
    high, wide = block
    for matrix in range(math.prod(weight.shape[:-2])):
        grid = scale_grid(scale, weight.shape, matrix)
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
    """Return the 256 values of an FP8 dtype, indexed by their bits.

    E4M3 (fn) has bias 7 and no infinities; E5M2 is the upper byte of float16. Source: Micikevicius et al., FP8 Formats
    for Deep Learning, 2022.
    """
    bits = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (bits << 8).view(np.float16).astype(np.float32)
    exponent, mantissa = (bits >> 3 & 15).astype(np.int32), (bits & 7).astype(np.float32)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    values = np.where(bits & 127 == 127, np.nan, values)
    signed: Floats = np.where(bits & 128, -values, values).astype(np.float32)
    return signed


def _block(weight: Tensor, scale: Tensor, stated: tuple[int, int] | None) -> tuple[int, int]:
    """Return the rows and columns of a weight that share one scale. Raises CheckpointError as `block_of` does."""
    if len(weight.shape) < 2:
        raise CheckpointError(f"{weight.name} is {weight.dtype} and no matrix: use the base that it was made of")
    return block_of(weight.name, weight.shape, scale, stated)


def block_of(name: str, weight: tuple[int, ...], scale: Tensor, stated: tuple[int, int] | None) -> tuple[int, int]:
    """Return the rows and columns that share one scale of a weight with this name and shape.

    The size that the config states counts if it fits the scale's shape, as blocks at the edges may be smaller.
    Otherwise all blocks are equal, and the shape says how large. Raises CheckpointError if neither fits.
    """
    rows, columns = weight[-2:]
    down, across = _grid_shape(scale, weight)
    if stated is not None and (down, across) == (-(-rows // stated[0]), -(-columns // stated[1])):
        return stated
    if scale.dtype in SCALE_DTYPES and down and across:
        leading = math.prod(scale.shape) == math.prod(weight[:-2]) * down * across
        if leading and not rows % down and not columns % across:
            return rows // down, columns // across
    raise CheckpointError(
        f"{scale.name} ({scale.dtype} {list(scale.shape)}) does not fit {name} {list(weight)}: use a complete base"
    )


def _grid_shape(scale: Tensor, weight: tuple[int, ...]) -> tuple[int, int]:
    """Return how many scales a matrix has down and across; `(0, 0)` for a shape that fits no matrix.

    Shapes `[]` and `[1]` mean one scale for the matrix, and `[rows]` one scale for each row.
    """
    if len(scale.shape) >= 2 and len(scale.shape) == len(weight):
        return scale.shape[-2], scale.shape[-1]
    count = math.prod(scale.shape)
    return (count, 1) if len(weight) == 2 and count in {1, weight[0]} else (0, 0)


def scale_grid(scale: Tensor, weight: tuple[int, ...], matrix: int = 0) -> Floats:
    """Return the float32 scales `[down, across]` of one matrix of a weight with this shape.

    A byte is an exponent (E8M0): `2 ** (byte - 127)`.
    """
    down, across = _grid_shape(scale, weight)
    narrow = scale.dtype in {"U8", "F8_E8M0", *FP8}
    values = to_numpy(replace(scale, dtype="U8") if narrow else scale).reshape(-1, down, across)[matrix]
    grid: Floats = values_of(scale.dtype)[values] if scale.dtype in FP8 else values.astype(np.float32)
    if scale.dtype in {"U8", "F8_E8M0"}:
        grid = np.exp2(grid - 127)
    return grid
