"""What a quantized checkpoint does beside its base, place by place: distributions, blocks, hidden states."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.validating.blocks import Rows
from requant.tasks.validating.measured import Measurement
from requant.tasks.validating.model import Skeleton, few_threads, free


@dataclass(frozen=True)
class Block:
    """One decoder block beside the base's. `error`: how far off its own work is, given what the base's block was given,
    relative to that work (what the block adds to the hidden states). `drift`: how far the hidden states after it are
    off, all blocks before it being quantized too, relative to the base's."""

    block: int
    kind: str
    error: float
    drift: float


@torch.inference_mode()
def compare(
    ours: Path,
    theirs: Path,
    of_ours: Measurement,
    of_base: Measurement,
    device: torch.device,
    dtype: torch.dtype,
    *,
    remote_code: bool = False,
) -> dict[str, Any]:
    """The divergence of the next-token distributions, the errors of the blocks, the difference of the vision towers.

    Both measurements are of the same tokens. Runs our blocks on the base's hidden states, one in memory at a time.
    """
    skeleton = Skeleton(Checkpoint.open(ours), dtype, device, remote_code=remote_code)
    skeleton.load_ends()
    source = Checkpoint.open(theirs)
    base = skeleton
    if not _same_output_layer(skeleton.checkpoint, source):
        base = Skeleton(source, dtype, device, remote_code=remote_code)
        base.load_ends()
    with few_threads(skeleton.nbytes):
        blocks = _blocks(skeleton, of_ours, of_base)
        divergence = _divergence(skeleton, base, of_ours, of_base)
    result: dict[str, Any] = {
        "blocks": [asdict(block) for block in blocks],
        "kl_divergence": float(divergence.mean()),
        "kl_divergence_p99": float(np.quantile(divergence, 0.99)),
    }
    del skeleton, base
    free(device)
    if of_base.features.numel():
        same_shape = of_ours.features.shape == of_base.features.shape
        difference = (of_ours.features.float() - of_base.features.float()).abs().max() if same_shape else torch.inf
        result["vision_difference"] = float(difference)
    return result


def _blocks(skeleton: Skeleton, of_ours: Measurement, of_base: Measurement) -> list[Block]:
    tokens = torch.from_numpy(of_base.tokens[:1, : of_base.probes.shape[1]]).long()
    rows = Rows.of(skeleton, tokens)
    kinds = getattr(skeleton.text.config, "layer_types", None) or ["decoder"] * len(skeleton.blocks)
    found = []
    for number in range(len(skeleton.blocks)):
        given, expected = (of_base.probes[number + k].to(skeleton.device) for k in (0, 1))
        rows.hidden = [given[None]]
        with skeleton.loaded(number) as block:
            rows.through(number, block)
        error = _relative(rows.hidden[0][0] - expected, expected - given)
        reached = of_base.probes[number + 1]
        drift = _relative(of_ours.probes[number + 1] - reached, reached)
        found.append(Block(number, kinds[number], error, drift))
    return found


def _divergence(skeleton: Skeleton, base: Skeleton, of_ours: Measurement, of_base: Measurement) -> Any:
    """KL(base || ours) of every next-token distribution, in nats."""
    found = []
    for ours, theirs in zip(of_ours.hidden, of_base.hidden, strict=True):
        one = skeleton.logits(ours[:-1].to(skeleton.device)).log_softmax(-1)
        other = base.logits(theirs[:-1].to(base.device)).log_softmax(-1)
        found.append((other.exp() * (other - one)).sum(-1).cpu().numpy())
    return np.stack(found)


def _same_output_layer(ours: Checkpoint, theirs: Checkpoint) -> bool:
    """Whether both have the same embeddings and output layer, byte for byte; the final norm is in the hidden states."""
    mine, others = _outside(ours), _outside(theirs)
    return mine.keys() == others.keys() and all(
        mine[name].nbytes == tensor.nbytes
        and all(a == b for a, b in zip(mine[name].chunks(), tensor.chunks(), strict=True))
        for name, tensor in others.items()
    )


def _outside(checkpoint: Checkpoint) -> dict[str, Tensor]:
    names = ("embed_tokens.weight", "lm_head")
    return {name: t for name, t in checkpoint.tensors.items() if any(part in name for part in names)}


def _relative(difference: torch.Tensor, size: torch.Tensor) -> float:
    norm = float(size.float().norm())
    off = float(difference.float().norm())
    return off / norm if norm else float(off > 0)
