"""Counting an engine's drafts at many places of a text, for a draft acceptance rate that two checkpoints share.

The prompts of a benchmark are too few for that: over 520 drafted tokens, the rate of one checkpoint moves by several
points. A model that writes much after one prompt repeats itself, and its rate is that of the repetition. So the model
continues many places of a text by a few tokens each, until the rate is known well enough. When to stop follows from the
scatter of the counts alone, and not from a limit that they are compared with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from requant.tasks.serving.client import Server, continue_texts
from requant.tasks.validating.drafts import MAX_DRAFTED_TOKENS, DraftCount, EngineSetup
from requant.tasks.validating.ratio import relative_half_width

log = logging.getLogger(__name__)

CONTEXT_LENGTH = 240  # characters before each place
PLACE_TOKENS = 16  # output tokens at each place
BATCH = 32  # places that are asked for at once, and counted together
MAX_BATCHES = 512  # for a checkpoint that drafts little
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class ServedCheckpoint:
    """A checkpoint in a folder, and the server that has it loaded. `engine` is `vllm`, or `url:` and an address."""

    folder: Path
    server: Server
    engine: str
    setup: EngineSetup


def places(text: str) -> Iterator[str]:
    """Yield CONTEXT_LENGTH characters before each place of a text, without end.

    The first places of any number are evenly spread over the text (multiples of the golden ratio, modulo 1), so that
    every batch has places of all its parts.
    """
    last = max(0, len(text) - CONTEXT_LENGTH)
    number = 0
    while True:
        start = int(number * GOLDEN % 1 * (last + 1))
        yield text[start : start + CONTEXT_LENGTH]
        number += 1


def count_drafts(server: Server, text: str, precision: float, setup: EngineSetup) -> DraftCount:
    """Let a server continue places of a text greedily, and return what it counted of its drafts.

    It goes on until half of the rate's interval is `precision` times the rate, or to MAX_DRAFTED_TOKENS or MAX_BATCHES.
    Raises EngineFailed, also if the server answers other requests meanwhile.
    """
    counts: list[tuple[int, int]] = []
    after = places(text)
    while len(counts) < MAX_BATCHES and sum(drafted for drafted, _ in counts) < MAX_DRAFTED_TOKENS:
        tokens, counters = continue_texts(server, list(islice(after, BATCH)), PLACE_TOKENS)
        if counters.drafts > tokens:  # at least one token comes with each draft
            raise server.failure(
                f"{server.url} drafted for others while its drafts were counted: let it answer nobody else meanwhile"
            )
        counts.append((int(counters.drafted), int(counters.accepted)))
        if relative_half_width(counts) <= precision:
            break
    drafted, accepted = (tuple(column) for column in zip(*counts, strict=True))
    count = DraftCount(drafted=drafted, accepted=accepted, version=setup.version, hardware=setup.hardware)
    known = "nothing was drafted" if count.rate is None else f"draft acceptance rate {count.rate:.1%}"
    log.info(f"{len(counts) * BATCH:,} places, {sum(drafted):,} drafted tokens: {known}")
    return count
