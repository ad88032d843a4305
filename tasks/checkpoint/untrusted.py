"""Reads JSON from untrusted files within limits, and makes untrusted names safe to print.

The limits on files of a checkpoint are here, with those that other modules check.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20  # config.json, the index, and quantization configs
MAX_HEADER_BYTES = 100_000_000  # the header of a shard: the limit of the reference reader of safetensors
MAX_SMALL_JSON_BYTES = 1 << 20  # processor_config.json
MAX_REMOVED_BYTES = 1 << 20  # the names of shards that an interrupted repair has to remove
MAX_SHARDS = 100_000
MAX_DEPTH = 100  # Python's limit is 1000 frames, and code that walks or writes a document needs several for a level
MAX_DIGITS = 308  # every integer of so many digits fits into a double
UNCHECKED_JSON_BYTES = 1 << 20  # JSON of this size is cheap to parse, however many values it holds
MAX_SHOWN_LENGTH = 200


def parse(raw: bytes) -> tuple[Any, list[str]]:
    """Parse JSON. Returns the document, and for each object with a repeated key the first such key.

    The last value of a repeated key counts, as in json.loads. Raises ValueError or RecursionError for input that other
    readers refuse too (invalid UTF-8, lone surrogates, integers of thousands of digits), and for input that would
    exhaust memory or stack (deep nesting, millions of tiny values).
    """
    brackets = raw.count(b"{") + raw.count(b"[")
    if len(raw) > UNCHECKED_JSON_BYTES and (12 * brackets > len(raw) or 6 * raw.count(b",") > len(raw)):
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
        json.dumps(document, ensure_ascii=False).encode()  # raises for a lone surrogate, which cannot be written
    return document, repeated


def shown(text: str) -> str:
    """Shorten a text and escape control characters, so that it can be part of a sentence."""
    cut = text if len(text) <= MAX_SHOWN_LENGTH else text[:MAX_SHOWN_LENGTH] + "..."
    return cut if cut.isprintable() else repr(cut)


def without_folder(sentence: str, folder: Path, name: str) -> str:
    """Return a sentence about a checkpoint in a temporary folder with the names of files alone, and `name` for it."""
    return sentence.replace(f"{folder}{os.sep}", "").replace(str(folder), name)


@contextmanager
def without_collector() -> Iterator[None]:
    """Disable the cyclic garbage collector while JSON is parsed.

    JSON has no cycles, and searching millions of new objects for them would take half of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _integer(text: str) -> int | float:
    """Parse an integer as the reference reader of safetensors does: `-0` is a float. Raises ValueError if too long."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)


def check_depth(document: Any) -> None:
    """Check that a document is not nested deeper than MAX_DEPTH. Raises ValueError if it is."""
    level = [document]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
