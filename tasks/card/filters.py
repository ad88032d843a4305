"""Escaping for Markdown: what comes from outside is shown as text, whatever it holds.

A `Markdown` string may stand in a page as it is. Everything else is escaped where it is rendered: by `rendered` behind
every `{{ }}` of a template, and by `table` in every cell. What Python or Jinja make of a Markdown string, as `+`, `%`,
`join` or an f-string, is a plain `str` again. So what is not marked is escaped, and nothing is let through by mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_NAME = 160  # characters: a data set's id and commit have room


class Markdown(str):
    """Text that nothing has to be escaped in: our own, or the result of a function of this module."""

    __slots__ = ()


def rendered(value: object) -> Markdown:
    """Escape a value of a template's `{{ }}`, unless it is Markdown. Passed to Jinja as `finalize`."""
    return value if isinstance(value, Markdown) else escape(value)


def escape(value: object) -> Markdown:
    """Escape a part of a sentence: everything that Markdown or HTML could read as more than text becomes `?`."""
    return Markdown(re.sub(r"[^\w .,:;%()'+=-]", "?", str(value)))


def named(name: object) -> Markdown:
    """Show a name as code, which nothing in it can leave."""
    return Markdown(f"`{name_characters(name) or '?'}`")


def name_characters(name: object) -> str:
    """Cut a name to MAX_NAME characters, and replace those that names do not need by `?`."""
    return re.sub(r"[^\w .,:+*/()@-]", "?", str(name))[:MAX_NAME].strip()


def hub_link(repo_id: str) -> Markdown:
    """Link a repo of the Hub."""
    name = repo_name(repo_id)
    return Markdown(f"[{name}](https://huggingface.co/{name})")


def repo_name(repo_id: str) -> Markdown:
    """Show the id of a repo, or `.` for a folder, as a word of a sentence or of a program."""
    return Markdown(re.sub(r"[^\w./-]", "?", repo_id))


def fence(text: str, language: str = "bash") -> Markdown:
    """Show a block of code, fenced by more backticks than it holds."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return Markdown(f"{ticks}{language}\n{text}\n{ticks}")


def cell(value: object) -> Markdown:
    """Escape a cell of a table: it stays one cell, and nothing in it is a link, code, emphasis or HTML."""
    if isinstance(value, Markdown):
        return value
    line = re.sub(r"[\r\n]+", " ", str(value))
    return Markdown(re.sub(r"[\\|`*~\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line).replace("<", "&lt;"))


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Markdown:
    """Lay out a table. Cells that are Markdown must hold no `|` and no line break, as those of `named` do."""
    lines = [header, tuple("---" for _ in header), *rows]
    return Markdown("\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines))


def number(value: float | None, form: str) -> str:
    """Format a number as `form` of Python's format() says; nothing for None."""
    return "" if value is None else format(value, form)
