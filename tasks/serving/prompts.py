"""The prompt sets: fixed words and fixed numbers of tokens, so that two checkpoints are asked the same.

`card`, `prose` and `chat` lie in tasks/prompts; `code` is the beginnings of functions of the pinned evaluation text.
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
CODE_COUNT, CODE_LENGTH, CODE_TOKENS = 8, 240, 256  # prompts; characters; tokens that are asked for


@dataclass(frozen=True)
class Prompt:
    """`chat` says that the text is a message to answer; otherwise it is to be continued. `tokens` are asked for."""

    set: str
    name: str
    text: str
    chat: bool
    tokens: int


def prompts_of(sets: Sequence[str], most: int | None = None) -> list[Prompt]:
    """The prompts of the named sets, in that order; `most` limits the tokens of each."""
    found = [prompt for name in dict.fromkeys(sets) for prompt in _read(name)]
    return [Prompt(p.set, p.name, p.text, p.chat, min(p.tokens, most or p.tokens)) for p in found]


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """Names what is asked: for stage keys."""
    return digest_of([vars(prompt) for prompt in prompts])


def python_prompts(count: int, length: int = CODE_LENGTH) -> list[str]:
    """Beginnings of `count` functions and classes of `length` characters, spread over the pinned evaluation text."""
    text = EVALUATION.read_text(encoding="utf-8")
    starts = [match.start() for match in re.finditer(r"^(?:def|class) \w", text, re.MULTILINE)]
    starts = [start for start in starts if start + length <= len(text)]
    if len(starts) < count:
        raise ValueError(f"the text has only {len(starts)} functions and classes")
    chosen = [starts[number * len(starts) // count] for number in range(count)]
    return [text[start : start + length] for start in chosen]


def has_chat_template(files: Collection[str], read: Callable[[str], bytes]) -> bool:
    """Whether a checkpoint says how messages are put into words: in a file of its own, or in its tokenizer's."""
    if {"chat_template.jinja", "chat_template.json"} & set(files):
        return True
    try:
        document = json.loads(read("tokenizer_config.json")) if "tokenizer_config.json" in files else None
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and bool(document.get("chat_template"))


@cache
def _read(name: str) -> tuple[Prompt, ...]:
    if name == "code":
        texts = python_prompts(CODE_COUNT)
        return tuple(Prompt(name, f"function {n}", text, False, CODE_TOKENS) for n, text in enumerate(texts, 1))
    document = json.loads((PROMPTS_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(Prompt(name, p["name"], p["text"], document["chat"], p["tokens"]) for p in document["prompts"])
