"""Measures how far each quantized matrix Q is from the base's matrix W, from both files, without a model or torch.

A norm of the difference hardly shows damage: scales that are 5 % off add almost nothing to a rounding error of 10 %.
As rounding is nearly unbiased, three figures together do show it:

    slope   <Q, W> / <W, W>: 1 apart from clipping; 1.05 if scales are 5 % too large, 0 for an unrelated matrix
    offset  the mean of (Q - W) in steps of the scale: 0; 1 or -1 if zero points are off by one
    error   |Q - W| / |W|: the rounding error, about 0.1 with 4 bits
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from requant.tasks.checkpoint.assemble import packed_parts
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.packing import (
    PackingScheme,
    dequantized_rows,
    float_rows,
    to_numpy,
    zero_points,
)
from requant.tasks.checkpoint.reading import Reading
from requant.tasks.checkpoint.rounding import SAMPLED_WEIGHTS, Rounding

PARALLEL_MATRICES = 2  # numpy releases the interpreter's lock


@dataclass(frozen=True)
class Fidelity:
    """A quantized matrix compared with the base's. rounding.py explains the last three figures."""

    name: str
    bits: int
    slope: float
    offset: float
    error: float
    slope_excess: float = 0.0
    scale_factor: float = 1.0
    rounding_noise: float = 0.0


def fidelity(quantized: Checkpoint, base: Checkpoint) -> list[Fidelity]:
    """Compare every quantized matrix with the base's, in the order of the base's tensors.

    Both checkpoints are read once, some rows at a time. Matrices whose packed parts contradict their scheme are left
    out; `account` of audit.py names them.
    """
    base = dequantize_fp8(split_fused_experts(base))
    parts = packed_parts(quantized.tensors.values())
    pairs = [
        (name, parts[module], scheme, source)
        for name, source in base.tensors.items()
        if (module := name.removesuffix(".weight")) in parts and name.endswith(".weight")
        if (scheme := _scheme(quantized.reading, Module(module, parts[module]), source)) is not None
    ]
    with ThreadPoolExecutor(PARALLEL_MATRICES) as pool:
        return list(pool.map(lambda pair: _compare(*pair), pairs))


def _scheme(reading: Reading, module: Module, source: Tensor) -> PackingScheme | None:
    """Return how a module is packed; None if its parts do not fit the config and the base's matrix."""
    return None if reading.problem(module, source.shape) else reading.scheme(module)


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
    row_step = max(1, -(-source.shape[0] * inputs // SAMPLED_WEIGHTS))
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
        sampled = slice(-row % row_step, None, row_step)
        by_weight = [values[:, row : row + len(ours)].T[sampled][:, group] for values in (scales, zeros)]
        sample.add(ours[sampled], theirs[sampled], by_weight[0].astype(np.float32), by_weight[1])
        row += len(ours)
    cells = row * len(present)
    if not ww or not cells:  # a base of zeros has no slope, and its only rounding is zeros
        return Fidelity(name, scheme.bits, float(dd == 0), 0.0, float(dd > 0), rounding_noise=float(dd > 0))
    fitted = (sample.slope_excess, sample.scale_factor, sample.rounding_noise)
    return Fidelity(name, scheme.bits, qw / ww, steps / cells, (dd / ww) ** 0.5, *fitted)
