"""Prompt sets with fixed texts and fixed numbers of output tokens, so that checkpoints can be compared.

`card`, `prose` and `chat` are files in tasks/prompts; `code` is the beginnings of functions in the evaluation text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from requant.tasks.artifact import digest_of
from requant.tasks.texts.text import EVALUATION

PROMPTS_FOLDER = Path(__file__).parent.parent / "prompts"
CODE_PROMPTS = 8
CODE_LENGTH = 240  # characters
CODE_TOKENS = 256


@dataclass(frozen=True)
class Prompt:
    """A prompt: a message to answer (`chat`) or a text to continue, with so many output `tokens`.

    The names of the fields are part of the digest in stage keys.
    """

    set: str
    name: str
    text: str
    chat: bool
    tokens: int


def load_prompts(sets: Sequence[str], most: int | None = None) -> list[Prompt]:
    """Load the prompts of the named sets, in this order. `most` limits the output tokens of each."""
    prompts = [prompt for name in dict.fromkeys(sets) for prompt in _load_set(name)]
    return [Prompt(p.set, p.name, p.text, p.chat, min(p.tokens, most or p.tokens)) for p in prompts]


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """Return the digest of prompts, which a stage key names."""
    return digest_of([vars(prompt) for prompt in prompts])


def python_prompts(count: int, length: int = CODE_LENGTH) -> list[str]:
    """Return the first `length` characters of `count` functions and classes, spread over the evaluation text."""
    text = EVALUATION.read_text(encoding="utf-8")
    starts = [match.start() for match in re.finditer(r"^(?:def|class) \w", text, re.MULTILINE)]
    starts = [start for start in starts if start + length <= len(text)]
    if len(starts) < count:
        raise ValueError(f"the text has only {len(starts)} functions and classes")
    chosen = [starts[number * len(starts) // count] for number in range(count)]
    return [text[start : start + length] for start in chosen]


def has_chat_template(files: Collection[str], read: Callable[[str], bytes]) -> bool:
    """Check whether a checkpoint has a chat template: in a file of its own, or in that of its tokenizer."""
    if {"chat_template.jinja", "chat_template.json"} & set(files):
        return True
    try:
        document = json.loads(read("tokenizer_config.json")) if "tokenizer_config.json" in files else None
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and bool(document.get("chat_template"))


@cache
def _load_set(name: str) -> tuple[Prompt, ...]:
    if name == "code":
        texts = python_prompts(CODE_PROMPTS)
        return tuple(Prompt(name, f"function {n}", text, False, CODE_TOKENS) for n, text in enumerate(texts, 1))
    document = json.loads((PROMPTS_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(Prompt(name, p["name"], p["text"], document["chat"], p["tokens"]) for p in document["prompts"])
