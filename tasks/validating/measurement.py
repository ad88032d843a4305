"""The arrays that were measured of one checkpoint, and the values that follow from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors

from requant.tasks.validating import LONG_CONTEXT, WHOLE_TEXT

RESAMPLES, LEVEL, SEED = 2000, 0.95, 0  # of the bootstrap; LEVEL: the share of resamples inside an interval
QUANTILE_RESAMPLES = 200  # of a quantile, which has to be sought among all places of each resample
UNDRAFTED = -1  # in `drafts`: no token was drafted here
AS_TORCH = {"hidden", "probes", "features"}

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """Arrays of n windows of L tokens of the pinned text. An array that could not be measured is empty.

    The windows of LONG_CONTEXT are the parts of one long window: a place of one depends on all places of those before.
    """

    tokens: Ints  # [n, L]
    nll: Floats  # [n, L-1], natural log, of token t+1 after the tokens up to t
    top1: Ints  # [n, L-1], the token chosen at t
    drafts: Ints  # [drafts, n, L-1], the head's choices for token t+2 and those after it, or UNDRAFTED
    generated: Ints  # [prompts, new], greedy
    speculation: Ints  # [prompts, 1 + drafts]: steps, and in how many of them each draft was accepted
    speculative: Floats  # [prompts], share of tokens that plain decoding gives, too (only in float32)
    context: Ints  # [2]: tokens of the long text, and at how many of them all values are finite
    hidden: torch.Tensor  # [n, L, hidden] after the final norm
    probes: torch.Tensor  # [blocks + 1, probe, hidden], inputs of each block, and outputs of the last
    features: torch.Tensor  # [patches, hidden] of a synthetic image
    domains: tuple[str, ...] = ()  # [n], the domain of each window; empty: all are of one text without domains

    @property
    def windows_by_domain(self) -> dict[str, Ints]:
        """The indices of the windows of each domain, in the order in which the domains were measured."""
        domains = self.domains or (WHOLE_TEXT,) * len(self.tokens)
        return {
            name: np.array([i for i, domain in enumerate(domains) if domain == name], np.int32)
            for name in dict.fromkeys(domains)
        }

    def of_windows(self, indices: Sequence[int] | Ints) -> Measurement:
        """Return the part of the measurement that is about these windows."""
        at = np.asarray(indices, np.int64)
        return replace(
            self,
            tokens=self.tokens[at],
            nll=self.nll[at],
            top1=self.top1[at],
            drafts=self.drafts[:, at] if self.drafts.size else self.drafts,
            hidden=self.hidden[torch.from_numpy(at)],
            domains=tuple(self.domains[i] for i in at) if self.domains else (),
        )

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
            judged = on_track[:, :last] & (draft[:, :last] != UNDRAFTED)
            accepted = (draft[:, :last] == self.top1[:, k + 1 :])[judged]
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

    @property
    def first_accepted(self) -> Doubles:
        """Where the first draft is what the main model would choose itself: 1 or 0, `[n, L-2]`."""
        accepted: Doubles = (self.drafts[0, :, :-1] == self.top1[:, 1:]).astype(np.float64)
        return accepted

    def to_bytes(self) -> bytes:
        """Write the arrays as a safetensors file."""
        arrays = {name: value for name, value in vars(self).items() if name != "domains"}
        tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
        return save_tensors({k: v.contiguous() for k, v in tensors.items()}, {"domains": json.dumps(self.domains)})

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Read a file with what `to_bytes` returned. The hidden states stay in the file until they are used."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            domains = tuple(json.loads(file.metadata()["domains"]))
        fields: dict[str, Any] = {k: v if k in AS_TORCH else v.numpy() for k, v in tensors.items()}
        return cls(**fields, domains=domains)


def aligned(one: Measurement, other: Measurement) -> tuple[Measurement, Measurement]:
    """Return two measurements with the same windows, if they differ only in the length of the long window.

    The long window is as long as the memory of the machine allows, and its beginning does not depend on its end.
    """
    common = min(len(one.tokens), len(other.tokens))
    rest = one.domains[common:] + other.domains[common:]
    if not rest or set(rest) != {LONG_CONTEXT} or one.domains[:common] != other.domains[:common]:
        return one, other
    return one.of_windows(range(common)), other.of_windows(range(common))


def perplexity_increase(ours: Measurement, base: Measurement) -> tuple[float, tuple[float, float]]:
    """Return our perplexity divided by the base's, minus 1, and its interval. Both have the same windows."""
    difference = ours.nll.mean(axis=1, dtype=np.float64) - base.nll.mean(axis=1, dtype=np.float64)
    return float(np.expm1(difference.mean())), interval(difference, np.expm1)


def interval(by_window: Doubles, transform: Callable[[Doubles], Doubles] = np.positive) -> tuple[float, float]:
    """Return the bootstrap interval of the mean over windows, after `transform`. The resamples are always the same.

    by_window: `[n]`, or `[n, k]` for k values of each window, of whose means `[..., k]` `transform` makes one `[...]`.
    """
    means = by_window[resampled(len(by_window), RESAMPLES)].mean(axis=1)
    low, high = np.quantile(transform(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def quantile_interval(by_window: Doubles, share: float) -> tuple[float, float]:
    """Return the bootstrap interval of a quantile of all places, `[n, places]`, by drawing whole windows."""
    drawn = by_window[resampled(len(by_window), QUANTILE_RESAMPLES)].reshape(QUANTILE_RESAMPLES, -1)
    low, high = np.quantile(np.quantile(drawn, share, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def resampled(windows: int, times: int = RESAMPLES) -> npt.NDArray[np.int64]:
    """Draw as many windows as there are, with replacement, so many times: `[times, windows]`."""
    return np.random.default_rng(SEED).integers(0, windows, (times, windows))
