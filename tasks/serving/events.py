"""Events of a streamed answer of OpenAI's HTTP API.

The server may be anybody's: a field that is not as it should be counts as absent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Self

MAX_TOKENS = 1 << 31


@dataclass(frozen=True)
class StreamEvent:
    """One event of a streamed answer.

    error: what the server reports instead of a piece of the answer; completion_tokens: how many tokens it has generated
    so far, if it says so; has_text: whether the event has a piece of the answer.
    """

    error: str | None = None
    completion_tokens: int | None = None
    has_text: bool = False

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read an event. Raises ValueError or RecursionError if it is not JSON."""
        document = json.loads(text)
        if not isinstance(document, dict):
            return cls()
        error, usage = document.get("error"), document.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        counted = isinstance(tokens, int) and 0 <= tokens < MAX_TOKENS
        return cls(str(error) if error else None, tokens if counted else None, _has_text(document.get("choices")))


def _has_text(choices: Any) -> bool:
    """Check whether the first choice has text of the answer or of the reasoning before it."""
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    parts = delta if isinstance(delta, dict) else choice
    return any(
        isinstance(parts.get(key), str) and parts[key] for key in ("text", "content", "reasoning_content", "reasoning")
    )
