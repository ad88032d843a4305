"""An engine's counters of speculative decoding, as it publishes them in the text format of Prometheus.

Their names are vLLM's (vllm/v1/spec_decode/metrics.py): drafts, their tokens, accepted tokens, and accepted tokens by
position in a draft. The server may be anybody's: lines that are not such a counter are skipped.
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
MAX_COUNT = 2.0**53  # a float counts up to here


@dataclass(frozen=True)
class DraftCounters:
    """Counts since the engine started, or between two moments.

    drafts: how many there were; drafted, accepted: tokens; by_position: accepted tokens by position in a draft.
    """

    drafts: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0
    by_position: dict[int, float] = field(default_factory=dict)

    def since(self, before: DraftCounters) -> DraftCounters:
        """Return what was counted since `before`."""
        return DraftCounters(
            self.drafts - before.drafts,
            self.drafted - before.drafted,
            self.accepted - before.accepted,
            {position: count - before.by_position.get(position, 0.0) for position, count in self.by_position.items()},
        )

    @property
    def acceptance(self) -> float | None:
        """The draft acceptance rate: accepted tokens divided by drafted tokens. None if nothing was drafted."""
        return round(self.accepted / self.drafted, 4) if self.drafted > 0 else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """The share of drafts whose token at position 1, 2, ... was accepted. Empty if nothing was drafted."""
        if self.drafts <= 0:
            return []
        return [round(self.by_position[position] / self.drafts, 4) for position in sorted(self.by_position)]


def parse_counters(text: str) -> DraftCounters:
    """Read the counters in a text, summed over the engines that it lists."""
    counts = {"drafts": 0.0, "draft_tokens": 0.0, "accepted_tokens": 0.0}
    by_position: dict[int, float] = {}
    for line in text.split("\n"):
        match = METRIC_LINE.match(line)
        value = _count(match[3]) if match else None
        if match is None or value is None:
            continue
        if match[1] != "accepted_tokens_per_pos":
            counts[match[1]] += value
        elif position := POSITION.search(match[2] or ""):
            by_position[int(position[1])] = by_position.get(int(position[1]), 0.0) + value
    return DraftCounters(counts["drafts"], counts["draft_tokens"], counts["accepted_tokens"], by_position)


def _count(text: str) -> float | None:
    """Read the value of a counter; return None if it is not a count."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value <= MAX_COUNT else None
