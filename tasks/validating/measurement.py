"""The arrays that were measured of one checkpoint, and the values that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

RESAMPLES, LEVEL, SEED = 2000, 0.95, 0  # of the bootstrap; LEVEL: the share of resamples inside an interval

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """Arrays of n windows of L tokens of the pinned text. An array that could not be measured is empty."""

    tokens: Ints  # [n, L]
    nll: Floats  # [n, L-1], natural log, of token t+1 after the tokens up to t
    top1: Ints  # [n, L-1], the token chosen at t
    drafts: Ints  # [drafts, n, L-1], the head's choices for token t+2 and those after it
    generated: Ints  # [prompts, new], greedy
    speculation: Ints  # [prompts, 1 + drafts]: steps, and in how many of them each draft was accepted
    speculative: Floats  # [prompts], share of tokens that plain decoding gives, too (only in float32)
    context: Ints  # [2]: tokens of the long text, and at how many of them all values are finite
    hidden: torch.Tensor  # [n, L, hidden] after the final norm
    probes: torch.Tensor  # [blocks + 1, probe, hidden], inputs of each block, and outputs of the last
    features: torch.Tensor  # [patches, hidden] of a synthetic image

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.mean(dtype=np.float64)))

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """The interval of the perplexity of other windows of this kind, at LEVEL, by bootstrap over the windows."""
        return interval(self.nll.mean(axis=1, dtype=np.float64), np.exp)

    @property
    def acceptance(self) -> float | None:
        """The share of first drafts that the main model would choose itself, given the true text before them."""
        by_position = self.acceptance_by_position
        return by_position[0] if by_position else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each draft the share of steps that accept it and all before it, as engines count it.

        A later draft can be judged only where the drafts before it are the true text. Its share is measured there, and
        the shares are multiplied.
        """
        shares: list[float] = []
        on_track = np.ones(self.drafts.shape[1:], bool)
        for k, draft in enumerate(self.drafts):
            last = draft.shape[1] - 1 - k  # the main model's choice for token t + 2 + k stands at t + 1 + k
            accepted = (draft[:, :last] == self.top1[:, k + 1 :])[on_track[:, :last]]
            shares.append(float(accepted.mean()) * (shares[-1] if shares else 1.0) if accepted.size else 0.0)
            is_true_text = np.zeros_like(on_track)
            is_true_text[:, :last] = draft[:, :last] == self.tokens[:, k + 2 :]
            on_track &= is_true_text
        return shares

    @property
    def greedy_acceptance_by_position(self) -> list[float]:
        """The same share in speculative decoding of greedy text; empty if there was none."""
        if not self.speculation.size:
            return []
        steps, *accepted = self.speculation.sum(axis=0).tolist()
        return [count / steps for count in accepted]

    def to_bytes(self) -> bytes:
        """Write the arrays as a safetensors file."""
        tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return save_tensors({k: v.contiguous() for k, v in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Measurement:
        """Read what `to_bytes` returned."""
        as_torch = {"hidden", "probes", "features"}
        fields: dict[str, Any] = {k: v if k in as_torch else v.numpy() for k, v in load_tensors(data).items()}
        return cls(**fields)


def perplexity_increase(ours: Measurement, base: Measurement) -> tuple[float, tuple[float, float]]:
    """Return our perplexity divided by the base's, minus 1, and its interval. Both have the same windows."""
    difference = ours.nll.mean(axis=1, dtype=np.float64) - base.nll.mean(axis=1, dtype=np.float64)
    return float(np.expm1(difference.mean())), interval(difference, np.expm1)


def interval(by_window: Doubles, transform: Callable[[Doubles], Doubles]) -> tuple[float, float]:
    """Return the bootstrap interval of the mean over windows, after `transform`. The resamples are always the same."""
    random = np.random.default_rng(SEED)
    drawn = random.integers(0, len(by_window), (RESAMPLES, len(by_window)))
    ends = np.quantile(by_window[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = transform(ends).tolist()
    return low, high
