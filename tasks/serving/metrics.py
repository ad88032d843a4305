"""An engine's counters of speculative decoding, from its Prometheus text, and what they say of a request.

Names are vLLM's (vllm/v1/spec_decode/metrics.py): drafts, the tokens in them, how many were accepted, and how many at
each position of a draft. The text comes from a server that may be anybody's: what is not such a counter is passed over.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

METRIC_LINE = re.compile(
    r"vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens|accepted_tokens_per_pos)(?:_total)?"
    r"(?:\{([^\n]{0,2000})\})?[ \t]+([0-9.eE+]{1,40})(?:[ \t]|$)"
)
POSITION = re.compile(r'(?:^|,)position="(\d{1,2})"')
MAX_COUNT = 2.0**53  # more is no count


@dataclass(frozen=True)
class Drafts:
    """Counts since the engine started, or between two moments; `by_position` has one for each position of a draft."""

    drafts: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0
    by_position: dict[int, float] = field(default_factory=dict)

    def since(self, before: Drafts) -> Drafts:
        """What happened after `before`."""
        return Drafts(
            self.drafts - before.drafts,
            self.drafted - before.drafted,
            self.accepted - before.accepted,
            {place: count - before.by_position.get(place, 0.0) for place, count in self.by_position.items()},
        )

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted; None where nothing was drafted."""
        return round(self.accepted / self.drafted, 4) if self.drafted > 0 else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts whose token at position 1, 2, ... was accepted; empty where nothing was drafted."""
        if self.drafts <= 0:
            return []
        return [round(self.by_position[place] / self.drafts, 4) for place in sorted(self.by_position)]


def read_drafts(text: str) -> Drafts:
    """The counters in a Prometheus text, summed over the engines that it speaks of."""
    counts = {"drafts": 0.0, "draft_tokens": 0.0, "accepted_tokens": 0.0}
    by_position: dict[int, float] = {}
    for line in text.split("\n"):
        match = METRIC_LINE.match(line)
        value = _count(match[3]) if match else None
        if match is None or value is None:
            continue
        if match[1] != "accepted_tokens_per_pos":
            counts[match[1]] += value
        elif place := POSITION.search(match[2] or ""):
            by_position[int(place[1])] = by_position.get(int(place[1]), 0.0) + value
    return Drafts(counts["drafts"], counts["draft_tokens"], counts["accepted_tokens"], by_position)


def _count(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value <= MAX_COUNT else None
