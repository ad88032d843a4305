"""Choose the rows from which every expert gets its share of tokens.

Rows are chosen for their experts first, and then in their order. Writing more rows alone would not help: samples of the
same size from more text have the same shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARE = 1 / 8  # of the tokens that an expert gets on average: the least that it should get
MAX_STARVED_NAMES = 20


@dataclass(frozen=True)
class Routing:
    """The tokens of each row that each expert gets.

    modules: the names of the modules that hold experts; tokens: int32 `[rows, modules, experts]`.
    """

    modules: tuple[str, ...]
    tokens: np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Choice:
    """The rows that are used, and what each expert gets of them.

    rows: their indices, in order; tokens: int64 `[modules, experts]`; least: how many tokens each expert of a module
    should get, float64 `[modules]`.
    """

    rows: tuple[int, ...]
    modules: tuple[str, ...]
    tokens: np.ndarray[Any, np.dtype[np.int64]]
    least: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def starved(self) -> list[str]:
        """The experts that get less than their share, as the module and the expert's number in it."""
        below = np.argwhere(self.tokens < self.least[:, None])
        return [f"{self.modules[module]}.{expert}" for module, expert in below]

    def to_json(self) -> dict[str, object]:
        return {
            "share": SHARE,
            "tokens": {name: row.tolist() for name, row in zip(self.modules, self.tokens, strict=True)},
            "starved": self.starved,
        }


def choose(lengths: Sequence[int], routing: Routing, tokens: int) -> Choice:
    """Choose rows with `tokens` tokens in all, or a few more, so that as many experts as possible get their share.

    `lengths` are the tokens of each row. The next row is the one that gives most to experts that lack tokens, for its
    length.
    """
    counts, sizes = routing.tokens, np.array(lengths)
    least = SHARE * counts.sum(axis=(0, 2)) / sizes.sum() * tokens / counts.shape[2]
    missing = np.repeat(least[:, None], counts.shape[2], axis=1)
    chosen = np.zeros(len(sizes), dtype=bool)
    while missing.any() and sizes[chosen].sum() < tokens:
        gains = np.minimum(counts, missing).sum(axis=(1, 2)) / sizes
        gains[chosen] = 0
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        chosen[best] = True
        missing = np.maximum(missing - counts[best], 0)
    for row in range(len(sizes)):
        if sizes[chosen].sum() >= tokens:
            break
        chosen[row] = True
    rows = np.flatnonzero(chosen)
    return Choice(tuple(rows.tolist()), routing.modules, counts[rows].sum(axis=0), least)
