"""Markdown that what it holds cannot break."""

from __future__ import annotations

import re
from collections.abc import Iterable


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A markdown table; cells cannot break out of it."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"[\r\n]+", " ", text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def code(text: str, language: str = "bash") -> str:
    """A block of code, fenced by more backticks than it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def gigabytes(size: int) -> str:
    """Bytes as people say them: GB of 10^9, MB and kB below."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.1f} kB"


def plain(text: object) -> str:
    """A sentence without anything that markdown or HTML could read as more than text."""
    return re.sub(r"[^\w .,:;%()'+=-]", "?", str(text))


def named(name: object) -> str:
    """A name from outside as code, which nothing in it can leave."""
    safe = re.sub(r"[^\w .,:+*/()-]", "?", str(name))[:80].strip()
    return f"`{safe or '?'}`"
