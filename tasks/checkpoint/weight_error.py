"""How far each packed matrix is from the base's: read from both files, without a model or torch.

Noise of rounding hides damage in a norm: scales that are 5 % off add to an error of 10 % hardly anything. Three figures
tell it apart, since rounding is nearly unbiased:

    slope   <Q, W> / <W, W>: 1 but for clipping; 1.05 where scales are 5 % too large, 0 where it is another matrix
    offset  the mean of (Q - W) in steps of its scale: 0; 1 or -1 where zero points are off by one
    error   |Q - W| / |W|: what rounding costs, about 0.1 in 4 bits
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from requant.tasks.checkpoint.assemble import packed_parts
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.packing import (
    PackingScheme,
    check_parts,
    dequantized_rows,
    float_rows,
    to_numpy,
    zero_points,
)
from requant.tasks.checkpoint.rounding import SAMPLED, Rounding
from requant.tasks.errors import CheckpointError

PARALLEL_MATRICES = 2  # matrices at a time: numpy works without the interpreter's lock


@dataclass(frozen=True)
class Fidelity:
    """One packed matrix beside the base's. The last three are rounding.py's, of a sample of its rows."""

    name: str
    bits: int
    slope: float
    offset: float
    error: float
    slope_excess: float = 0.0
    scale_factor: float = 1.0
    rounding_noise: float = 0.0


def fidelity(quantized: Checkpoint, base: Checkpoint) -> list[Fidelity]:
    """Every packed matrix that the base has too, in the order of its tensors. Reads both once, some rows at a time.

    Packed parts that contradict their scheme are left out: `account` says which.
    """
    base = dequantize_fp8(split_fused_experts(base))
    parts = packed_parts(quantized.tensors.values())
    quantization = quantized.config.get("quantization_config") or {}
    pairs = [
        (name, parts[module], scheme, source)
        for name, source in base.tensors.items()
        if (module := name.removesuffix(".weight")) in parts and name.endswith(".weight")
        if (scheme := _scheme(quantization, module, parts[module], source)) is not None
    ]
    with ThreadPoolExecutor(PARALLEL_MATRICES) as pool:
        return list(pool.map(lambda pair: _compare(*pair), pairs))


def _scheme(
    quantization: Mapping[str, Any], module: str, parts: Mapping[str, Tensor], source: Tensor
) -> PackingScheme | None:
    """How a module is packed; None if its parts are not that of the base's matrix."""
    try:
        scheme = PackingScheme.of(quantization, module)
    except CheckpointError:
        return None
    return None if check_parts(module, parts, scheme, source.shape) else scheme


def _compare(name: str, parts: Mapping[str, Tensor], scheme: PackingScheme, source: Tensor) -> Fidelity:
    scales = to_numpy(parts["scales"]).astype(np.float64)
    inputs = source.shape[1]
    group = np.arange(inputs) // (inputs if scheme.group_size == -1 else scheme.group_size)
    if "g_idx" in parts:
        group = to_numpy(parts["g_idx"])
    order = np.argsort(group, kind="stable")
    in_order = bool((order[1:] > order[:-1]).all())
    present, begins, counts = np.unique(group[order], return_index=True, return_counts=True)
    zeros = zero_points(parts, scheme)
    every = max(1, -(-source.shape[0] * inputs // SAMPLED))  # rows, of which one is sampled
    sample = Rounding(scheme.bits)
    ww = qw = dd = steps = 0.0
    row = 0
    for ours, theirs in zip(dequantized_rows(parts, scheme), float_rows(source), strict=True):
        difference = ours - theirs
        ww += float(np.vdot(theirs, theirs))
        qw += float(np.vdot(ours, theirs))
        dd += float(np.vdot(difference, difference))
        by_group = np.add.reduceat(difference if in_order else difference[:, order], begins, axis=1) / counts
        scale = scales[present, row : row + len(ours)].T
        steps += float(np.divide(by_group, scale, out=np.zeros_like(scale), where=scale != 0).sum())
        taken = slice(-row % every, None, every)
        by_weight = [values[:, row : row + len(ours)].T[taken][:, group] for values in (scales, zeros)]
        sample.add(ours[taken], theirs[taken], by_weight[0].astype(np.float32), by_weight[1])
        row += len(ours)
    cells = row * len(present)
    if not ww or not cells:  # A base of zeros has no slope, and nothing but zeros is a rounding of it.
        return Fidelity(name, scheme.bits, float(dd == 0), 0.0, float(dd > 0), rounding_noise=float(dd > 0))
    fitted = (sample.slope_excess, sample.scale_factor, sample.rounding_noise)
    return Fidelity(name, scheme.bits, qw / ww, steps / cells, (dd / ww) ** 0.5, *fitted)
