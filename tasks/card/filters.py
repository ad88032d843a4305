"""Escaping for Markdown, so that a page shows every value from outside as text.

A `Markdown` string is put into a page as it is. All other values are escaped where they are rendered: by `rendered` in
every `{{ }}` of a template, and by `table` in every cell. An operation on a Markdown string, such as `+`, `join` or an
f-string, returns a plain `str`, which is escaped. So no value gets into a page unescaped by mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_NAME = 160  # characters: enough for the id and the commit of a data set


class Markdown(str):
    """Text that needs no escaping: Requant's own, or the result of a function of this module."""

    __slots__ = ()


def rendered(value: object) -> Markdown:
    """Escape a value of a template's `{{ }}`, unless it is Markdown. Jinja calls this function as its `finalize`."""
    return value if isinstance(value, Markdown) else escape(value)


def escape(value: object) -> Markdown:
    """Escape a part of a sentence: every character that could be markup in Markdown or HTML becomes `?`."""
    return Markdown(re.sub(r"[^\w .,:;%()'+=-]", "?", str(value)))


def named(name: object) -> Markdown:
    """Show a name as code. No character of the name can end the code."""
    return Markdown(f"`{name_characters(name) or '?'}`")


def name_characters(name: object) -> str:
    """Cut a name to MAX_NAME characters, and replace those that names do not need by `?`."""
    return re.sub(r"[^\w .,:+*/()@-]", "?", str(name))[:MAX_NAME].strip()


def hub_link(repo_id: str) -> Markdown:
    """Link a repo of the Hub."""
    name = repo_name(repo_id)
    return Markdown(f"[{name}](https://huggingface.co/{name})")


def repo_name(repo_id: str) -> Markdown:
    """Show the id of a repo, or `.` for a folder, as a plain word in a sentence or in code."""
    return Markdown(re.sub(r"[^\w./-]", "?", repo_id))


def fence(text: str, language: str = "bash") -> Markdown:
    """Show a block of code, in a fence of more backticks than the code has in a row."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return Markdown(f"{ticks}{language}\n{text}\n{ticks}")


def cell(value: object) -> Markdown:
    """Escape a cell of a table. It stays one cell, without links, code, emphasis or HTML."""
    if isinstance(value, Markdown):
        return value
    line = re.sub(r"[\r\n]+", " ", str(value))
    return Markdown(re.sub(r"[\\|`*~\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line).replace("<", "&lt;"))


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Markdown:
    """Lay out a table. Cells that are Markdown must not have `|` or line breaks; those of `named` have none."""
    lines = [header, tuple("---" for _ in header), *rows]
    return Markdown("\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines))


def number(value: float | None, form: str) -> str:
    """Format a number by a format specification of Python. Empty for None."""
    return "" if value is None else format(value, form)
