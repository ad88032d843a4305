"""Measures how far each quantized matrix Q is from the base's matrix W, from both files, without a model or torch.

A norm of the difference hardly shows damage: scales that are 5 % off add almost nothing to a rounding error of 10 %.
As rounding is nearly unbiased, three figures together do show it:

    slope   <Q, W> / <W, W>: 1 apart from clipping; 1.05 if scales are 5 % too large, 0 for an unrelated matrix
    offset  the mean of (Q - W) in steps of the scale: 0; 1 or -1 if zero points are off by one
    error   |Q - W| / |W|: the rounding error, about 0.1 with 4 bits
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.packing import float_rows
from requant.tasks.checkpoint.rounding import SAMPLED_WEIGHTS, Rounding
from requant.tasks.checkpoint.stored_matrix import matrix_of, quantized_module
from requant.tasks.errors import CheckpointError

PARALLEL_MATRICES = 2  # numpy releases the interpreter's lock


@dataclass(frozen=True)
class Fidelity:
    """A quantized matrix compared with the base's.

    rounding.py explains the last three figures, which are None for floating-point codes.
    """

    name: str
    bits: int
    slope: float
    offset: float
    error: float
    slope_excess: float | None = 0.0
    scale_factor: float | None = 1.0
    rounding_noise: float | None = 0.0


def fidelity(quantized: Checkpoint, base: Checkpoint) -> list[Fidelity]:
    """Compare every quantized matrix with the base's, in the order of the base's tensors.

    Both checkpoints are read once, some rows at a time. Matrices that cannot be read are left out; `account` of
    audit.py names them.
    """
    base = dequantize_fp8(split_fused_experts(base))
    pairs = [
        (module, source)
        for name, source in base.tensors.items()
        if (module := quantized_module(quantized, name)) is not None
    ]
    with ThreadPoolExecutor(PARALLEL_MATRICES) as pool:
        compared = pool.map(lambda pair: _compare(quantized, *pair), pairs)
        return [fidelity for fidelity in compared if fidelity is not None]


def _compare(quantized: Checkpoint, module: Module, source: Tensor) -> Fidelity | None:
    """Compare the matrix of a module with the base's; None if it cannot be read."""
    try:
        matrix = matrix_of(quantized, module, source.shape)
    except CheckpointError:
        return None
    group, bits = matrix.group, matrix.bits
    order = np.argsort(group, kind="stable")
    in_order = bool((order[1:] > order[:-1]).all())
    present, begins, counts = np.unique(group[order], return_index=True, return_counts=True)
    row_step = max(1, -(-source.shape[0] * source.shape[1] // SAMPLED_WEIGHTS))
    sample = Rounding(bits)
    ww = qw = dd = steps = 0.0
    row = 0
    for ours, theirs in zip(matrix.rows(), float_rows(source), strict=True):
        difference = ours - theirs
        ww += float(np.vdot(theirs, theirs))
        qw += float(np.vdot(ours, theirs))
        dd += float(np.vdot(difference, difference))
        by_group = np.add.reduceat(difference if in_order else difference[:, order], begins, axis=1) / counts
        scale = matrix.scales[present, row : row + len(ours)].T.astype(np.float64) * matrix.step
        steps += float(np.divide(by_group, scale, out=np.zeros_like(scale), where=scale != 0).sum())
        if matrix.zeros is not None:
            sampled = slice(-row % row_step, None, row_step)
            by_weight = [v[:, row : row + len(ours)].T[sampled][:, group] for v in (matrix.scales, matrix.zeros)]
            sample.add(ours[sampled], theirs[sampled], *by_weight)
        row += len(ours)
    cells = row * len(present)
    if not ww or not cells:  # a base of zeros has no slope, and its only rounding is zeros
        return Fidelity(source.name, bits, float(dd == 0), 0.0, float(dd > 0), rounding_noise=float(dd > 0))
    figures = (source.name, bits, qw / ww, steps / cells, (dd / ww) ** 0.5)
    if matrix.zeros is None:
        return Fidelity(*figures, slope_excess=None, scale_factor=None, rounding_noise=None)
    return Fidelity(*figures, sample.slope_excess, sample.scale_factor, sample.rounding_noise)
