"""Rows as a base writes them, and the batches in which they are kept until all are there.

A batch is one file with a row a line. It does not change once it has its name, so a killed run goes on after the last
batch, on another machine too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from requant.tasks.checkpoint.writer import write_file

BATCHES = "batches"
# An answer loops if the runs of RUN tokens in its last TAIL tokens are fewer than LOOP of what they could be, as in one
# that repeats 60 tokens or fewer. In the code and chats of builtin:mixed, none of 2,000 places is below 0.57.
TAIL, RUN, LOOP = 256, 16, 0.25


@dataclass(frozen=True)
class Start:
    """What a row begins with: the token ids of a rendered prompt, or of the beginning of a text."""

    domain: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """A row to be written: its number among all rows, its beginning, and the seed of its sampling."""

    number: int
    start: Start
    seed: int


@dataclass(frozen=True)
class Row:
    """A row that a base wrote.

    tokens: the ids of the prompt and the answer, with all special tokens; prompt_tokens: how many of them are the
    prompt's; problem: why the row is not used, empty if it is; engine: what wrote it.
    """

    number: int
    domain: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    problem: str
    engine: str

    @classmethod
    def of(cls, order: Order, answer: Sequence[int], stops: frozenset[int], engine: str) -> Self:
        """Make a row of an order and the token ids that the base wrote. `stops` are the ids that end an answer."""
        tokens = (*order.start.tokens, *answer)
        problem = "empty" if not set(answer) - stops else "loops" if loops(answer) else ""
        return cls(order.number, order.start.domain, tokens, len(order.start.tokens), problem, engine)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a row of a batch. Raises ValueError, TypeError or KeyError for anything else."""
        fields = json.loads(line)
        return cls(**{**fields, "tokens": tuple(fields["tokens"])})


# Writes the answers to some orders, in their order, as token ids.
Writer = Callable[[Sequence[Order]], list[list[int]]]


def loops(answer: Sequence[int]) -> bool:
    """Check whether an answer ends in a loop.

    `is_loop` in `probing/loops.py` judges a model's answers, and looks at them whole. Here rows of calibration text
    are left out, so more repetition is asked for: a row that repeats some lines is used.
    """
    tail = answer[-TAIL:]
    runs = [tuple(tail[begin : begin + RUN]) for begin in range(len(tail) - RUN + 1)]
    return len(runs) >= TAIL // 4 and len(set(runs)) < LOOP * len(runs)


def write_batch(folder: Path, number: int, rows: Iterable[Row]) -> None:
    """Write a finished batch, whole or not at all."""
    lines = (json.dumps(asdict(row), separators=(",", ":")).encode() + b"\n" for row in rows)
    write_file(folder, f"{BATCHES}/batch-{number:05d}.jsonl", lines)


def read_batches(folder: Path) -> Iterator[list[Row]]:
    """Yield the finished batches one after another, up to the first that is missing or cannot be read."""
    for name in batch_files(folder):
        try:
            yield [Row.from_json(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        except (ValueError, TypeError, KeyError, AttributeError):
            return


def batch_files(folder: Path) -> list[str]:
    """List the finished batches of a work folder, by their paths in it, up to the first that is missing."""
    names: list[str] = []
    while (folder / (name := f"{BATCHES}/batch-{len(names):05d}.jsonl")).is_file():
        names.append(name)
    return names


def more_offered(folder: Path, paths: list[str]) -> bool:
    """Check whether the store offers more batches than the folder has."""
    return len(paths) > len(batch_files(folder))
