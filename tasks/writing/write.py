"""Write rows until there are enough tokens, and until every expert of a base with experts gets its share of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import RecipeError
from requant.tasks.formatting import format_duration
from requant.tasks.writing.engine import ANOTHER_TEXT, WritingBase, open_writer
from requant.tasks.writing.experts import MAX_STARVED_NAMES, Choice, Routing, choose
from requant.tasks.writing.rows import Row, Start, Writer, read_batches, write_batch
from requant.tasks.writing.schedule import Schedule

# How many times the tokens that are needed are written to choose from, if some experts do not get their share of fewer.
POOLS = (1, 2, 4)
# How much more is written if conversations fill too few samples, and how many times what was asked at most.
GROWTH, MAX_GROWTH = 1.25, 4
Progress = Callable[[float], None]  # gets the finished share, from 0 to 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """What is to be written: at least so many tokens, and as many more as it takes until rows are `enough`."""

    tokens: int
    seed: int
    enough: Callable[[Sequence[Row]], bool] = lambda rows: True


@dataclass(frozen=True)
class WrittenText:
    """What a base wrote. rows: those that are used; written: all; choice: how they were chosen, for their experts."""

    rows: tuple[Row, ...]
    written: tuple[Row, ...]
    choice: Choice | None


def write_text(base: WritingBase, starts: Sequence[Start], need: Need, folder: Path, progress: Progress) -> WrittenText:
    """Let a base write rows that are enough.

    Finished batches are kept in `folder`, and a call that finds some there goes on after them. Raises RecipeError if
    too little of what the base writes can be used, and what `open_writer` and writers raise.
    """
    writing = _Writing(base, Schedule(starts, need.tokens, base.row_tokens, need.seed), folder, progress)
    counter, tokens = _Counter(base), need.tokens
    while True:
        rows, choice = _write(writing, counter, tokens)
        if need.enough(rows):
            break
        if tokens >= MAX_GROWTH * need.tokens:
            raise RecipeError(
                f"the {tokens:,} tokens that the base wrote for its calibration do not fill the samples: lower "
                f"quantize.nsamples, or {ANOTHER_TEXT}"
            )
        tokens = int(GROWTH * tokens)
        log.info("the conversations fill too few samples: more are written")
    if choice is not None and choice.starved:
        log.warning(f"{_starved(choice)} of the calibration text")
    return WrittenText(tuple(rows), tuple(writing.rows), choice)


def _write(writing: _Writing, counter: _Counter, tokens: int) -> tuple[list[Row], Choice | None]:
    """Write rows with so many tokens. With experts, choose them from more if it takes that to give each its share."""
    for pool in POOLS:
        usable = writing.write(pool * tokens)
        routing = counter.count(usable)
        if routing is None:
            return usable, None
        choice = choose([len(row.tokens) for row in usable], routing, tokens)
        if not choice.starved:
            break
        log.info(f"{_starved(choice)} of {pool * tokens:,} tokens")
    return [usable[index] for index in choice.rows], choice


class _Counter:
    """Counts the tokens that each expert gets of rows, of each row once."""

    def __init__(self, base: WritingBase) -> None:
        self._base = base
        self._counted: Routing | None = None

    def count(self, rows: Sequence[Row]) -> Routing | None:
        """Count those of the rows that came since the last call.

        Return the counts of all; None if the base has no experts, or they cannot be counted.
        """
        before = len(self._counted.tokens) if self._counted else 0
        more = self._count(rows[before:])
        if more is not None:
            tokens = more.tokens if self._counted is None else np.concatenate([self._counted.tokens, more.tokens])
            self._counted = Routing(more.modules, tokens)
        return self._counted

    def _count(self, rows: Sequence[Row]) -> Routing | None:
        checkpoint = Checkpoint.open(self._base.folder)
        if not rows or not any(".experts." in name for name in checkpoint.tensors):
            return None
        from requant.tasks.validating.measure import run_settings  # torch takes seconds to import
        from requant.tasks.validating.model import Skeleton
        from requant.tasks.writing.routing import count_routed, has_experts

        skeleton = Skeleton(checkpoint, run_settings(self._base.folder, self._base.remote_code))
        log.info(f"counting the tokens that each expert gets of {len(rows)} rows")
        try:
            routing = count_routed(skeleton, [row.tokens for row in rows]) if has_experts(skeleton) else None
        finally:
            skeleton.drop()
        if routing is None or not routing.tokens.any():  # Some models do not tell the experts which tokens are theirs.
            log.warning(f"the tokens of each expert cannot be counted in {type(skeleton.model).__name__}")
            return None
        return routing


class _Writing:
    """Rows that are written batch by batch."""

    def __init__(self, base: WritingBase, schedule: Schedule, folder: Path, progress: Progress) -> None:
        self._base, self._schedule, self._folder, self._progress = base, schedule, folder, progress
        self._finished = read_batches(folder)
        self._batches = 0
        self.rows: list[Row] = []

    def write(self, tokens: int) -> list[Row]:
        """Write until there are so many usable tokens, and return all usable rows.

        Batches of an earlier process are taken as they are.
        """
        self._schedule.raise_to(tokens)
        while self._schedule.tokens_missing and (batch := next(self._finished, None)) is not None:
            self._add(batch)
        if self._schedule.tokens_missing:
            with open_writer(self._base) as (writer, engine):
                there = f", of which {self._schedule.tokens_missing:,} are missing" if self.rows else ""
                log.info(f"{engine} writes calibration text: {tokens:,} tokens{there}")
                self._write_missing(writer, engine, tokens)
        return [row for row in self.rows if not row.problem]

    def _write_missing(self, writer: Writer, engine: str, tokens: int) -> None:
        began_s, missing_before = time.monotonic(), self._schedule.tokens_missing
        while self._schedule.tokens_missing:
            orders = self._schedule.orders()
            answers = writer(orders)
            stops = self._base.stops
            batch = [Row.of(*pair, stops, engine) for pair in zip(orders, answers, strict=True)]
            write_batch(self._folder, self._batches, batch)
            self._add(batch)
            missing = self._schedule.tokens_missing
            left_s = (time.monotonic() - began_s) * missing / max(1, missing_before - missing)
            about = f", about {format_duration(left_s)} left" if missing else ""
            log.info(f"written: {max(0, tokens - missing):,} of {tokens:,} tokens{about}")
            self._progress(1 - missing / tokens)

    def _add(self, batch: list[Row]) -> None:
        self._batches += 1
        self._schedule.add(batch)
        self.rows += batch


def _starved(choice: Choice) -> str:
    """Say which experts do not get their share."""
    names = ", ".join(choice.starved[:MAX_STARVED_NAMES])
    more = f" and {len(choice.starved) - MAX_STARVED_NAMES} more" if len(choice.starved) > MAX_STARVED_NAMES else ""
    return f"{len(choice.starved)} experts get less than their share ({names}{more})"
