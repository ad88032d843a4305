"""What a probe asks, and what the engine replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Sampling = Literal["greedy", "sampled"]
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A question to a model.

    name: its own in its set; group: questions of one group are not independent of each other; messages: as in OpenAI's
    API, or empty for a plain `text` to continue; tools: function definitions of the same API; think: whether the chat
    template may begin a thought; max_tokens: of the answer, its thought included.
    """

    name: str
    group: str
    messages: tuple[Json, ...]
    max_tokens: int
    text: str = ""
    tools: tuple[Json, ...] = ()
    think: bool = False
    sampling: Sampling = "greedy"
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """A question as the engine's chat template renders it.

    tokens: its token ids; end: the last tokens of it as text; max_tokens: of prompt and answer together in this engine.
    """

    tokens: tuple[int, ...]
    end: str
    max_tokens: int


@dataclass(frozen=True)
class Reply:
    """An answer. tokens: its token ids; text: with special tokens; ended: whether the model itself ended it."""

    tokens: tuple[int, ...]
    text: str
    ended: bool
    prompt: Prompt
