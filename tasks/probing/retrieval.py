"""The set `retrieval`: values to be found in texts of 4,096 tokens and every power of two above, up to a limit.

A text is made of paragraphs of the built-in texts in random order. Sentences with values stand between them: some are
asked for, and others differ from these in one word. No paragraph is in a text twice while there are others left.

Several values of one text are asked for, so that an engine with a prefix cache reads the text once. They lie far apart
and are asked for one by one, and count as independent.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from requant.tasks.artifact import digest_of, sha256_of
from requant.tasks.probing.outcome import Outcome
from requant.tasks.probing.question import Question, Reply
from requant.tasks.probing.thought import split_thought
from requant.tasks.texts.text import BUILTIN_FOLDER

TEXT = BUILTIN_FOLDER / "mixed.jsonl"
SHORTEST, LONGEST = 4_096, 131_072  # tokens
TEXTS = 3  # of each length
NEEDLES = 6  # values of each text that are asked for, at depths spread over it
MAX_TOKENS = 64
VERSION = 1  # of how texts are made
PLACES = (
    "Aberdeen", "Bergen", "Cordoba", "Dresden", "Esbjerg", "Florence", "Ghent", "Hobart", "Izmir", "Jaipur", "Kyoto",
    "Leeds", "Malmo", "Nantes", "Oulu", "Porto", "Quito", "Riga", "Seville", "Tampere", "Utrecht", "Valencia",
)  # fmt: skip
THINGS = ("harbour", "library", "observatory", "railway", "theatre", "waterworks")
INSTRUCTION = "Somewhere in the following text, access codes are mentioned. Read it: a question about them follows."
MIN_PARAGRAPH, MAX_PARAGRAPH = 40, 2_000  # characters


@dataclass(frozen=True)
class Needle:
    """A value to be found."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        return f"The access code of the {self.key} is {self.value}."


@dataclass(frozen=True)
class Haystack:
    """A text with values in it. asked: those that are asked for; others: the distractors."""

    length: int
    number: int
    text: str
    asked: tuple[Needle, ...]
    others: tuple[Needle, ...]

    def question(self, needle: Needle, *, chat: bool) -> Question:
        """Return the question for one value: a message, or for a model without a chat template a text to continue."""
        name = f"{self.length}/{self.number}/{needle.key}"
        asked = f"What is the access code of the {needle.key}? Answer with the number alone."
        content = f"{INSTRUCTION}\n\n{self.text}\n\n{asked}"
        messages = ({"role": "user", "content": content},) if chat else ()
        plain = f"{self.text}\n\nThe access code of the {needle.key} is"
        return Question(name, name, messages, MAX_TOKENS, text="" if chat else plain)


def lengths(max_tokens: int) -> Iterator[int]:
    """Yield the lengths up to this one."""
    length = SHORTEST
    while length <= min(max_tokens, LONGEST):
        yield length
        length *= 2


def make_haystack(length: int, number: int, characters: int) -> Haystack:
    """Make the text with this number, of about so many characters. One number gives the same order and values."""
    chosen = random.Random(f"{length} {number}")
    keys = [f"{thing} of {place}" for thing in THINGS for place in PLACES]
    chosen.shuffle(keys)
    values = chosen.sample(range(100_000, 1_000_000), 2 * NEEDLES)
    needles = [Needle(key, str(value)) for key, value in zip(_pairs_of_near_keys(keys), values, strict=False)]
    asked, others = needles[0::2], needles[1::2]
    paragraphs = _paragraphs(chosen, characters - sum(len(needle.sentence) for needle in needles))
    # Each asked value lies in its own part of the text; its distractor lies anywhere.
    places = [(index + chosen.random()) / NEEDLES for index in range(NEEDLES)]
    for place, needle in [*zip(places, asked, strict=True), *((chosen.random(), other) for other in others)]:
        paragraphs.insert(round(place * len(paragraphs)), needle.sentence)
    return Haystack(length, number, "\n\n".join(paragraphs), tuple(asked), tuple(others))


def judge_reply(haystack: Haystack, needle: Needle, reply: Reply) -> Outcome:
    """Judge an answer. `retrieval`: the first number of six digits in it is the value."""
    answer = split_thought(reply).answer
    found = re.search(r"(?<!\d)\d{6}(?!\d)", answer.replace(",", ""))
    right = found is not None and found[0] == needle.value
    if right:
        reason = ""
    elif found and any(found[0] == other.value for other in (*haystack.asked, *haystack.others)):
        reason = "another value of the text"
    else:
        reason = "no value of the text"
    question = haystack.question(needle, chat=False)
    return Outcome(question=question.name, group=question.group, measures={"retrieval": right}, reason=reason)


def length_of(outcome: Outcome) -> int:
    """Return the length in tokens of the text that a question was about."""
    return int(outcome.question.partition("/")[0])


@functools.cache
def digest_of_texts() -> str:
    """Return the digest of what texts are made of, which the stage key names."""
    return digest_of([VERSION, sha256_of(TEXT), SHORTEST, TEXTS, NEEDLES, MAX_TOKENS])


@functools.cache
def sample_text() -> str:
    """Return a part of the text by which the characters of a token are counted."""
    return "\n\n".join(_paragraphs(random.Random(0), 20_000))


def _pairs_of_near_keys(keys: list[str]) -> Iterator[str]:
    """Yield keys and, after each, one that differs in the place: harbour of Riga, harbour of Oulu."""
    free = list(keys)
    while free:
        key = free.pop(0)
        thing = key.partition(" of ")[0]
        near = next((other for other in free if other.startswith(f"{thing} of ")), None)
        if near is None:
            return
        free.remove(near)
        yield from (key, near)


def _paragraphs(chosen: random.Random, characters: int) -> list[str]:
    """Return paragraphs in random order, with so many characters in all. Each comes again only when all have come."""
    taken: list[str] = []
    left = characters
    while True:
        order = list(_all_paragraphs())
        chosen.shuffle(order)
        for paragraph in order:
            if left <= 0:
                return taken
            taken.append(paragraph[:left])
            left -= len(paragraph) + 2


@functools.cache
def _all_paragraphs() -> tuple[str, ...]:
    rows = map(json.loads, TEXT.read_text(encoding="utf-8").splitlines())
    texts = (row["text"] for row in rows if "text" in row)
    paragraphs = (paragraph.strip() for text in texts for paragraph in re.split(r"\n\s*\n", text))
    fitting = (paragraph for paragraph in paragraphs if MIN_PARAGRAPH <= len(paragraph) <= MAX_PARAGRAPH)
    return tuple(dict.fromkeys(fitting))
