"""Which rows a base writes next, so that every domain gets the same number of tokens.

What comes next follows from the rows that are there and from the seed alone, so a killed run goes on as if it had never
stopped.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from requant.tasks.errors import RecipeError
from requant.tasks.writing.rows import Order, Row, Start

MAX_BATCH = 128  # rows
# A base may write this many times the tokens that are needed. If it writes empty or looping rows, it needs more.
MAX_EFFORT = 4


class Schedule:
    """Orders rows in turn from all domains that lack tokens.

    tokens: how many usable tokens are needed; row_tokens: how many a row has at most. A domain of which too little can
    be used gets no more than MAX_EFFORT times its share, and the others write the rest.
    """

    def __init__(self, starts: Sequence[Start], tokens: int, row_tokens: int, seed: int) -> None:
        self._starts = _in_turn(starts, seed)
        self._tokens, self._row_tokens, self._seed = tokens, row_tokens, seed
        self.kept, self._written, self._orders = Counter[str](), Counter[str](), Counter[str]()
        self._next = 0

    @property
    def tokens_missing(self) -> int:
        """How many usable tokens are still to be written."""
        short = sum(self._share - self.kept[domain] for domain in self._short)
        return math.ceil(short) if short else max(0, self._tokens - self.kept.total())

    @property
    def _share(self) -> float:
        """How many usable tokens each domain is to have."""
        return self._tokens / len(self._starts)

    @property
    def _willing(self) -> list[str]:
        """The domains that may write more."""
        return [domain for domain in self._starts if self._written[domain] < MAX_EFFORT * self._share]

    @property
    def _short(self) -> list[str]:
        """The domains that may write more and do not have their share."""
        return [domain for domain in self._willing if self.kept[domain] < self._share]

    def raise_to(self, tokens: int) -> None:
        """Ask for more tokens, in all."""
        self._tokens = tokens

    def add(self, rows: Iterable[Row]) -> None:
        """Count rows that are written."""
        for row in rows:
            self._written[row.domain] += len(row.tokens)
            self.kept[row.domain] += 0 if row.problem else len(row.tokens)
            self._orders[row.domain] += 1
            self._next = max(self._next, row.number + 1)

    def orders(self) -> list[Order]:
        """Return the next batch. Raises RecipeError if the base wrote enough, and too little of it can be used."""
        domains = self._short or self._willing
        if not domains:
            raise RecipeError(
                f"the base wrote {self._written.total():,} tokens for its calibration, of which {self.kept.total():,} "
                f"in rows that neither loop nor are empty, and {self._tokens:,} are needed: name another text as "
                "quantize.calibration, such as builtin:mixed"
            )
        # One row more than expected: another batch for the last few tokens would take as long as this one.
        rows = {domain: min(MAX_BATCH, 1 + self._rows_for(domain, len(domains))) for domain in domains}
        places = sorted(((place + 0.5) / count, domain) for domain, count in rows.items() for place in range(count))
        orders, ordered = [], Counter(self._orders)
        for number, (_, domain) in enumerate(places[:MAX_BATCH], self._next):
            starts = self._starts[domain]
            start = starts[ordered[domain] % len(starts)]
            ordered[domain] += 1
            orders.append(Order(number, start, random.Random(f"{self._seed} {number}").getrandbits(31)))
        return orders

    def _rows_for(self, domain: str, domains: int) -> int:
        """Return how many rows of a domain, one of so many that write, give the tokens that it lacks."""
        missing = self._share - self.kept[domain]
        missing = missing if missing > 0 else self.tokens_missing / domains
        orders = self._orders[domain]
        return math.ceil(missing * orders / max(1, self.kept[domain]) if orders else missing / self._row_tokens)


def _in_turn(starts: Sequence[Start], seed: int) -> Mapping[str, Sequence[Start]]:
    """Group the starts by domain, in an order that the seed decides."""
    domains: dict[str, list[Start]] = {}
    for start in starts:
        domains.setdefault(start.domain, []).append(start)
    for domain, group in domains.items():
        random.Random(f"{seed} {domain}").shuffle(group)
    return domains
