"""JSON and names that strangers wrote: parsed within bounds, told without control characters."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_DEPTH = 100  # levels: Python's limit is 1000 frames, and what walks or writes a document takes several each
MAX_DIGITS = 308
HARMLESS_BYTES = 1 << 20  # bytes that cannot cost much, whatever they hold
MAX_SHOWN_LENGTH = 200  # characters of a name in a sentence


def parse(raw: bytes) -> tuple[Any, list[str]]:
    """The document, and the keys that stand twice in an object of it (the last one counts, as in json.loads).

    Raises ValueError or RecursionError for what other readers refuse too (no strict UTF-8, half characters, integers
    of thousands of digits), and for what is only made to exhaust memory or stack: nesting, millions of tiny values.
    """
    brackets = raw.count(b"{") + raw.count(b"[")
    if len(raw) > HARMLESS_BYTES and (12 * brackets > len(raw) or 6 * raw.count(b",") > len(raw)):
        raise ValueError("it holds more values than a checkpoint has names for")
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            seen: set[str] = set()
            repeated.append(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
        return document

    with without_collector():
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=collect, parse_int=_integer)
    if b"\\u" in raw:
        json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair is no text, and cannot be written
    return document, repeated


def shown(text: str) -> str:
    """A name for a sentence: cut, and with escapes for whatever would move a terminal's cursor or end the line."""
    cut = text if len(text) <= MAX_SHOWN_LENGTH else text[:MAX_SHOWN_LENGTH] + "..."
    return cut if cut.isprintable() else repr(cut)


@contextmanager
def without_collector() -> Iterator[None]:
    """No search for cycles while millions of objects are made that have none: it would take half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _integer(text: str) -> int | float:
    """As the reference reader has it: `-0` is no size, and what is beyond a float's range is no number."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)


def check_depth(document: Any) -> None:
    """Raises ValueError for a document that is nested deeper than any checkpoint's."""
    level = [document]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
