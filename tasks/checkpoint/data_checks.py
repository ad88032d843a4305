"""Finds problems in the data of a checkpoint: NaN and infinity, scales of zero, an MTP head that was dequantized.

Every floating point tensor is read once, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import modules_of, split_name
from requant.tasks.checkpoint.packing import float_rows
from requant.tasks.progress import progress

# The bits of the exponent by dtype: all are set in infinity and NaN.
EXPONENT = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
MAGNITUDE = {"<u2": 0x7FFF, "<u4": 0x7FFFFFFF, "<u8": 0x7FFFFFFFFFFFFFFF}
SCALE_PARTS = {"scales", "weight_scale", "weight_scale_inv"}
PROBED_GROUP_SIZES = (32, 64, 128)
SAMPLED_ROWS = 64  # rows of a matrix that are searched for traces of quantization: thousands of groups


def is_finite(chunk: bytes, dtype: str) -> bool:
    """Check whether no value of a chunk is NaN or infinite. True for dtypes that are not floating point."""
    if dtype not in EXPONENT:
        return True
    kind, mask = EXPONENT[dtype]
    values = np.frombuffer(chunk, dtype=kind)
    return not bool(np.any((values & np.array(mask, dtype=kind)) == mask))


def deep_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the problems in the data of a checkpoint as sentences."""
    read = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype in EXPONENT]
    with progress("inspect", sum(tensor.nbytes for tensor in read), "bytes") as bar:
        for tensor in read:
            if not all(is_finite(chunk, tensor.dtype) for chunk in tensor.chunks()):
                yield f"{tensor.name} has values that are not numbers or infinite: quantize this layer again"
            elif split_name(tensor.name)[1] in SCALE_PARTS and _has_zero(tensor):
                yield f"{tensor.name} has scales of zero: the groups that they belong to are lost"
            bar.advance(tensor.nbytes)
    head = checkpoint.head
    for module in modules_of(checkpoint.tensors[n] for n in (head.names if head else ())).values():
        weight = module.parts.get("weight")
        if module.storage == "plain" and weight is not None and len(weight.shape) == 2:
            yield from _dequantization_traces(weight)


def _has_zero(tensor: Tensor) -> bool:
    kind = EXPONENT[tensor.dtype][0]
    magnitude = np.array(MAGNITUDE[kind], dtype=kind)
    return any(bool(np.any((np.frombuffer(c, dtype=kind) & magnitude) == 0)) for c in tensor.chunks())


def _dequantization_traces(weight: Tensor) -> Iterator[str]:
    """Find out whether a weight was dequantized from 4 bits, and whether its zero point is wrong.

    A group of 4 bits has at most 16 distinct values at equal distances; a group of trained BF16 weights has dozens. The
    mean of a group is near zero. If it is one step off, the zero point was read as GPTQ stores it, minus one, without
    adding the one. Some published scripts do this; it costs 6 to 8 percentage points of draft acceptance rate.
    """
    if weight.shape[1] % min(PROBED_GROUP_SIZES) or weight.dtype not in EXPONENT:
        return
    first = next(float_rows(weight), None)
    if first is None:
        return
    values = first[:SAMPLED_ROWS]
    for size in sorted((size for size in PROBED_GROUP_SIZES if not weight.shape[1] % size), reverse=True):
        groups = values.reshape(-1, size)
        groups = groups[np.any(groups != 0, axis=1)]
        ordered = np.sort(groups, axis=1)
        steps = np.diff(ordered, axis=1)
        distinct = 1 + (steps > 0).sum(1)
        if not len(groups) or np.mean(distinct <= 16) < 0.99:
            continue
        step = np.where(steps > 0, steps, np.inf).min(1)
        offset = np.abs(groups.mean(1)) / np.where(np.isfinite(step), step, 1)
        if np.median(offset) > 0.75:
            yield (
                f"{weight.name} was dequantized from 4 bits with a zero point that is one off, and drafts badly: "
                "restore it with requant mtp-fix --base"
            )
        else:
            yield (
                f"{weight.name} was dequantized from 4 bits, which loses precision: "
                "restore it with requant mtp-fix --base"
            )
        return
