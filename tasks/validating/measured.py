"""What was measured of one checkpoint, and the figures that follow from it. Two of them make a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

RESAMPLED, LEVEL, SEED = 2000, 0.95, 0

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """Arrays by position, of n windows of L tokens of the pinned text. What could not be measured is empty."""

    tokens: Ints  # [n, L]
    nll: Floats  # [n, L-1], natural log, of token t+1 after the tokens up to t
    top1: Ints  # [n, L-1], the choice at t
    drafts: Ints  # [drafts, n, L-1], the head's choices for token t+2 and those after it
    generated: Ints  # [prompts, new], greedy
    speculation: Ints  # [prompts, 1 + drafts]: steps, and in how many of them each draft was taken
    speculative: Floats  # [prompts], share of tokens that are those of plain decoding (only in float32)
    context: Ints  # [2]: the longest text that was tried, and at how many of its positions all is finite
    hidden: torch.Tensor  # [n, L, hidden] after the final norm
    probes: torch.Tensor  # [blocks + 1, probe, hidden], what goes into each block and comes out of the last
    features: torch.Tensor  # [patches, hidden] of a synthetic image

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.mean(dtype=np.float64)))

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """Where the perplexity of other such windows would lie, at LEVEL: bootstrap over windows."""
        return interval(self.nll.mean(axis=1, dtype=np.float64), np.exp)

    @property
    def acceptance(self) -> float | None:
        """Share of first drafts that the main model would choose itself, given the true text before them."""
        by_position = self.acceptance_by_position
        return by_position[0] if by_position else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """For 1, 2, ... draft tokens the share of steps that take this one and all before it, as engines count it.

        Whether a later draft is taken can be told only where the true text goes on as the drafts before it said: it is
        measured there, and the shares are multiplied.
        """
        shares: list[float] = []
        on_track = np.ones(self.drafts.shape[1:], bool)
        for k, draft in enumerate(self.drafts):
            last = draft.shape[1] - 1 - k  # the main model's choice for token t + 2 + k stands at t + 1 + k
            taken = (draft[:, :last] == self.top1[:, k + 1 :])[on_track[:, :last]]
            shares.append(float(taken.mean()) * (shares[-1] if shares else 1.0) if taken.size else 0.0)
            true = np.zeros_like(on_track)
            true[:, :last] = draft[:, :last] == self.tokens[:, k + 2 :]
            on_track &= true
        return shares

    @property
    def greedy_acceptance_by_position(self) -> list[float]:
        """The same share over the steps of a speculative decoding of its own greedy text; empty if none was made."""
        if not self.speculation.size:
            return []
        steps, *taken = self.speculation.sum(axis=0).tolist()
        return [count / steps for count in taken]

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return save_tensors({k: v.contiguous() for k, v in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Measurement:
        kept = {"hidden", "probes", "features"}
        fields: dict[str, Any] = {k: v if k in kept else v.numpy() for k, v in load_tensors(data).items()}
        return cls(**fields)


def perplexity_increase(ours: Measurement, base: Measurement) -> tuple[float, tuple[float, float]]:
    """Our perplexity over the base's, minus 1, and its interval: the same windows of both are compared."""
    difference = ours.nll.mean(axis=1, dtype=np.float64) - base.nll.mean(axis=1, dtype=np.float64)
    return float(np.expm1(difference.mean())), interval(difference, np.expm1)


def interval(by_window: Doubles, figure: Any) -> tuple[float, float]:
    """The middle LEVEL of `figure` of the mean over windows drawn again and again, always the same ones."""
    random = np.random.default_rng(SEED)
    drawn = random.integers(0, len(by_window), (RESAMPLED, len(by_window)))
    ends = np.quantile(by_window[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = figure(ends).tolist()
    return low, high
