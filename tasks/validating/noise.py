"""The noise floor: how far a base is from itself when the same sums are computed in another way.

Engines compute in other precisions, batches and orders than this package does. What such a difference does to the
next-token distributions is no damage. So a part of the windows is run again: in the other precision of float32 and
bfloat16, in the opposite order, and several at a time.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from requant.tasks.checkpoint.blocks import streaming_parameters
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.validating import LONG_CONTEXT
from requant.tasks.validating.blocks import Rows, run_blocks
from requant.tasks.validating.compare import kl_divergence
from requant.tasks.validating.measured import NoiseFloor
from requant.tasks.validating.measurement import Measurement
from requant.tasks.validating.model import RunSettings, Skeleton, few_threads, free, room

NOISE_WINDOWS = 4  # of each domain; a mean over 2,000 places is enough for a value that others are compared with
BATCH = 4  # windows that are computed at a time
log = logging.getLogger(__name__)


@torch.inference_mode()
def noise_floor(base_folder: Path, of_base: Measurement, settings: RunSettings) -> NoiseFloor:
    """Run a part of the windows of a base's measurement again, and return the mean KL divergence from it.

    Raises CheckpointError for a model that cannot be run on several windows at a time.
    """
    first = [index for rows in of_base.windows_by_domain.values() for index in rows[:NOISE_WINDOWS]]
    part = of_base.of_windows(first)
    checkpoint = Checkpoint.open(base_folder)
    base = Skeleton(checkpoint, settings)
    other = Skeleton(checkpoint, replace(settings, dtype=_other_dtype(checkpoint, settings)))
    other.load_ends()
    dtype = str(other.dtype).removeprefix("torch.")
    log.info(f"measuring the noise floor of {base_folder.name} on {part.tokens.size:,} tokens ({dtype})")
    with few_threads(other.nbytes):
        again = replace(part, hidden=_hidden_states(other, part))
        base.load_ends()
        kl = kl_divergence(other, base, again, part)
    del base, other
    free(settings.device)
    return NoiseFloor(
        kl_divergence=float(kl.mean()),
        domains={name: float(kl[rows].mean()) for name, rows in part.windows_by_domain.items()},
        dtype=dtype,
    )


def _other_dtype(checkpoint: Checkpoint, settings: RunSettings) -> torch.dtype:
    """Choose the other precision, or the same one where float32 does not fit."""
    if settings.dtype == torch.float32:
        return torch.bfloat16
    fits = 6 * streaming_parameters(checkpoint) < room(settings.device)
    return torch.float32 if fits else settings.dtype


def _hidden_states(skeleton: Skeleton, part: Measurement) -> torch.Tensor:
    """Run the windows from the last to the first, BATCH at a time, and the long text.

    Returns the hidden states after the final norm in the order of the windows, `[n, L, hidden]`.
    """
    ids = torch.from_numpy(part.tokens).long()
    separate = len(ids) - part.domains.count(LONG_CONTEXT)
    backwards = ids[:separate].flip(0)
    batches = [backwards[begin : begin + BATCH][None] for begin in range(0, separate, BATCH)]
    long = [ids[separate:].reshape(1, -1)] if separate < len(ids) else []
    states = run_blocks(skeleton, [Rows.of(skeleton, tokens) for tokens in (*batches, *long)])
    states = [state.reshape(-1, *ids.shape[1:], state.shape[-1]) for state in states]
    forwards = [torch.cat(states[: len(batches)]).flip(0)] if batches else []
    return torch.cat([*forwards, *states[len(batches) :]]).cpu()
