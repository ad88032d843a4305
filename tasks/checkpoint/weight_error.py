"""Measures how far each quantized matrix Q is from the base's matrix W, from both files, without a model.

A norm of the difference hardly shows damage: scales that are 5 % off add almost nothing to a rounding error of 10 %.
As rounding is nearly unbiased, three figures together do show it:

    slope   <Q, W> / <W, W>: 1 apart from clipping; 1.05 if scales are 5 % too large, 0 for an unrelated matrix
    offset  the mean of (Q - W) in steps of the scale: 0; 1 or -1 if zero points are off by one
    error   |Q - W| / |W|: the rounding error, about 0.1 with 4 bits
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.dequantize import group_of_inputs, plain_tensor, stripe_rows, stripes, zero_points
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import Dequantized, dequantize_fp8
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.rounding import SAMPLED_WEIGHTS, Rounding
from requant.tasks.checkpoint.stored_matrix import StoredMatrix, matrix_of, quantized_module
from requant.tasks.checkpoint.torch_tensor import to_torch
from requant.tasks.errors import CheckpointError

CPU = torch.device("cpu")
COMPARING_BYTES = 1 << 30  # that one matrix takes at most: its codes, stripes of both, differences and products


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


def fidelity(
    quantized: Checkpoint, base: Checkpoint, device: torch.device = CPU, free_bytes: int = COMPARING_BYTES
) -> list[Fidelity]:
    """Compare every quantized matrix with the base's on a device, in the order of the base's tensors.

    Both checkpoints are read once, by all cores, or by as many as the free memory of the device allows. Matrices that
    cannot be read are left out; `account` of audit.py names them.
    """
    base = dequantize_fp8(split_fused_experts(base))
    pairs = [
        (module, source)
        for name, source in base.tensors.items()
        if (module := quantized_module(quantized, name)) is not None
    ]
    cores = torch.get_num_threads()
    at_once = max(1, min(cores, free_bytes // COMPARING_BYTES))
    torch.set_num_threads(1)  # of each thread of the pool
    try:
        with ThreadPoolExecutor(at_once) as pool:
            compared = pool.map(lambda pair: _compare(quantized, pair[0], pair[1], device), pairs)
            return [fidelity for fidelity in compared if fidelity is not None]
    finally:
        torch.set_num_threads(cores)


def _compare(quantized: Checkpoint, module: Module, source: Tensor, device: torch.device) -> Fidelity | None:
    """Compare the matrix of a module with the base's; None if it cannot be read."""
    try:
        matrix = matrix_of(quantized, module, source.shape)
    except CheckpointError:
        return None
    groups = group_of_inputs(matrix, device)
    present, counts = np.unique(matrix.group, return_counts=True)
    steps = torch.from_numpy(matrix.scales[present].astype(np.float64) * matrix.step).to(device).T
    sampled = _Sample(matrix, zero_points(matrix, CPU))
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    by_rows = zip(stripe_rows(matrix.shape, device), stripes(matrix, device), _stripes_of(source, device), strict=True)
    for rows, ours, theirs in by_rows:
        difference = ours - theirs
        if groups is None:
            by_group = difference.view(len(difference), len(present), -1).mean(-1)
        else:
            one_hot = groups[:, None] == torch.from_numpy(present).to(device)
            by_group = difference @ one_hot.float() / torch.from_numpy(counts).to(device)
        in_steps = torch.where(steps[rows] != 0, by_group / steps[rows], 0.0)
        products = (theirs * theirs, ours * theirs, difference * difference, in_steps)
        sums += torch.stack([product.sum(dtype=torch.float64) for product in products])
        sampled.add(rows, ours, theirs)
    ww, qw, dd, offset = sums.tolist()
    cells = matrix.shape[0] * len(present)
    name, bits = source.name, matrix.bits
    if not ww or not cells:  # a base of zeros has no slope, and its only rounding is zeros
        return Fidelity(name, bits, float(dd == 0), 0.0, float(dd > 0), rounding_noise=float(dd > 0))
    figures = (name, bits, qw / ww, offset / cells, (dd / ww) ** 0.5)
    if matrix.zeros is None:
        return Fidelity(*figures, slope_excess=None, scale_factor=None, rounding_noise=None)
    return Fidelity(
        *figures, sampled.rounding.slope_excess, sampled.rounding.scale_factor, sampled.rounding.rounding_noise
    )


class _Sample:
    """Evenly spaced rows of a matrix with zero points, whose rounding is checked. Without zero points it takes none."""

    def __init__(self, matrix: StoredMatrix, zeros: torch.Tensor | None) -> None:
        self._matrix, self._zeros = matrix, None if zeros is None else zeros.numpy()
        self._step = max(1, -(-matrix.shape[0] * matrix.shape[1] // SAMPLED_WEIGHTS))
        self.rounding = Rounding(matrix.bits)

    def add(self, rows: slice, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Check the sampled ones of these rows, `[rows, in]`."""
        if self._zeros is None:
            return
        first = -rows.start % self._step
        pair = (values[first :: self._step].cpu().numpy() for values in (ours, theirs))
        of_matrix = slice(rows.start + first, rows.stop, self._step)
        by_weight = (v.T[of_matrix][:, self._matrix.group] for v in (self._matrix.scales, self._zeros))
        self.rounding.add(*pair, *by_weight)


def _stripes_of(source: Tensor, device: torch.device) -> Iterator[torch.Tensor]:
    """Read a matrix of the base in float32 stripes, on a device; one of FP8 is dequantized as a whole."""
    height, width = source.shape
    whole = plain_tensor(source, device) if isinstance(source, Dequantized) else None
    row_bytes = source.nbytes // max(height, 1)
    for rows in stripe_rows((height, width), device):
        if whole is not None:
            yield whole[rows].float()
            continue
        begin, end = (source.begin + row * row_bytes for row in (rows.start, rows.stop))
        part = replace(source, shape=(rows.stop - rows.start, width), begin=begin, end=end)
        yield to_torch(part, device).float()
