"""Rows of the texts to calibrate and to measure on: each has a `text`, or the `messages` of a chat.

A .txt file is one row. Files in JSON, JSON Lines and Parquet have rows with columns. If a row has both columns, its
`text` is used. If its `text` is empty, as in some published data sets, and it has no messages, the row is skipped.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import RecipeError

COLUMNS = ("text", "messages")
JSON_SUFFIXES = (".jsonl", ".json")
# A bracket, or a string; `key`: a string that a colon follows.
JSON_TOKEN = re.compile(r'[{}\[\]]|(?P<key>"(?:[^"\\]++|\\.)*+")(?=\s*:)|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
MAX_SHOWN_COLUMNS = 20
MAX_MESSAGES = 10_000
# What reading a file raises that is not as its name says. The errors of json and pyarrow are subclasses of these.
READ_ERRORS = (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Message:
    """A message of a chat. A chat template gets `fields`, which may have more keys than `role` and `content`."""

    fields: Mapping[str, Any]

    @property
    def role(self) -> str:
        """The role of its author, for instance `user`."""
        return str(self.fields["role"])

    @property
    def text(self) -> str:
        """Its content, or of a content in several parts those that are text."""
        content = self.fields.get("content")
        if isinstance(content, list):
            parts = (part.get("text") for part in content if isinstance(part, dict))
            return "".join(part for part in parts if isinstance(part, str))
        return content if isinstance(content, str) else ""


@dataclass(frozen=True)
class Row:
    """A document: a text or the messages of a chat, and the domain that `builtin:mixed` gives it."""

    text: str = ""
    messages: Sequence[Message] = ()
    domain: str = ""

    @property
    def characters(self) -> int:
        """The length of the text or of all messages, without what a chat template adds."""
        return len(self.text) + sum(len(message.text) for message in self.messages)


@dataclass(frozen=True)
class UncheckedRow:
    """A row as it is in a file, where a column may hold anything."""

    text: object = None
    messages: object = None
    domain: object = None

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Self:
        return cls(columns.get("text"), columns.get("messages"), columns.get("domain"))

    @property
    def is_chat(self) -> bool:
        """Whether the row has messages and no text."""
        return bool(self.messages) and not self.text

    def check(self, *, chats: bool) -> Row | None:
        """Return the row if it has a text or, with `chats`, messages; otherwise None.

        Raises ValueError if these are not a string or a list of messages.
        """
        domain = self.domain if isinstance(self.domain, str) else ""
        if self.text:
            if not isinstance(self.text, str):
                raise ValueError(f"a row has {type(self.text).__name__} as text, not a string")
            return Row(text=self.text, domain=domain)
        if not chats or not self.messages:
            return None
        if not isinstance(self.messages, list) or not all(map(_is_message, self.messages)):
            raise ValueError('messages of a row must be a list of {"role": ..., "content": ...}')
        if len(self.messages) > MAX_MESSAGES:
            raise ValueError(f"a row has {len(self.messages):,} messages, and at most {MAX_MESSAGES:,} are read")
        return Row(messages=tuple(map(Message, self.messages)), domain=domain)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def read_rows(paths: Iterable[str | Path], name: str = "the text", *, chats: bool = False) -> Iterator[Row]:
    """Yield the rows of these files; rows of `messages` only with `chats`.

    Raises RecipeError, which calls the text `name`, for a file that cannot be read, and if no row of any file can be
    used.
    """
    columns: list[str] = []
    usable = skipped_chats = False
    try:
        for path in map(str, paths):
            for unchecked in _read_file(path, columns):
                row = unchecked.check(chats=chats)
                if row is not None:
                    usable = True
                    yield row
                skipped_chats = skipped_chats or (not chats and bool(unchecked.messages))
    except RecipeError:
        raise
    except READ_ERRORS as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise RecipeError(
            f"{name} cannot be read ({type(error).__name__}: {shown(reason)}): correct the file, or name another text"
        ) from error
    if not usable:
        raise RecipeError(explain_unusable(name, columns, skipped_chats=skipped_chats))


def explain_unusable(name: str, columns: Sequence[str], *, skipped_chats: bool = False) -> str:
    """Say in a sentence why no row of a text with these columns can be used.

    `skipped_chats` says that there are messages, and that the text was not read as chats.
    """
    if not columns:
        return f"{name} is empty: name a text with rows of {' or '.join(COLUMNS)}"
    names = ", ".join(shown(column) for column in columns[:MAX_SHOWN_COLUMNS])
    if len(columns) > MAX_SHOWN_COLUMNS:
        names += f" and {len(columns) - MAX_SHOWN_COLUMNS} more"
    if skipped_chats:
        return (
            f"the rows of {name} (columns {names}) hold no text, and their messages are not read: a data set has "
            "chats if the first row of its first file has messages and no text column: mend that row, or "
            "name another text"
        )
    if set(columns) & set(COLUMNS):
        return f"the rows of {name} (columns {names}) hold nothing in {' or '.join(COLUMNS)}: name another text"
    return (
        f"the rows of {name} have the columns {names}; a row needs {' or '.join(COLUMNS)}: "
        "rename a column, or name another text"
    )


def plain_chat(messages: Sequence[Message]) -> str:
    """Write a chat without a chat template: `role: content`, one message after another."""
    return "\n\n".join(f"{message.role}: {message.text}" for message in messages)


def columns_of(head: bytes, tail: bytes, suffix: str, *, cut: bool = False) -> tuple[str, ...]:
    """Read the names of a file's columns from its first and last bytes; return none if these are not enough.

    A Parquet file has them at its end, a JSON file in its first row. `cut` says that `head` cannot be made longer: then
    a first row that does not end in it has the columns that begin in it, if one of them is text or messages.
    """
    with contextlib.suppress(*READ_ERRORS):
        if suffix == ".parquet":
            import pyarrow.parquet

            return tuple(pyarrow.parquet.read_metadata(io.BytesIO(tail)).schema.to_arrow_schema().names)
        if suffix in JSON_SUFFIXES:
            text = head.decode("utf-8", errors="ignore").lstrip()  # the last character may be incomplete
            text = text[1:].lstrip() if text.startswith("[") else text
            try:
                row = json.JSONDecoder().raw_decode(text)[0]
                return tuple(row) if isinstance(row, dict) else ()
            except ValueError:
                columns = _keys_of_cut_object(text) if cut else ()
                return columns if set(columns) & set(COLUMNS) else ()
    return ()


def _keys_of_cut_object(text: str) -> tuple[str, ...]:
    """Return the keys of a JSON object of which only the beginning is there."""
    keys, depth = [], 0
    for match in JSON_TOKEN.finditer(text):
        token = match[0]
        depth += (token in "{[") - (token in "}]")
        if depth < 1:
            break
        if depth == 1 and match["key"] is not None:
            keys.append(json.loads(match["key"]))
    return tuple(keys)


def needs_template(paths: Iterable[str | Path]) -> bool:
    """Check whether a row of these files has messages and no text. A file that cannot be read has no such row."""
    for path in map(str, paths):
        with contextlib.suppress(*READ_ERRORS):
            if path.endswith(JSON_SUFFIXES) and not _contains(path, b'"messages"'):
                continue
            if path.endswith(".txt"):
                continue
            if any(row.is_chat for row in _read_file(path, [])):
                return True
    return False


def _contains(path: str, wanted: bytes) -> bool:
    """Check whether a file contains these bytes, which is far cheaper than reading its rows."""
    with open(path, "rb") as stream:
        before = b""
        while chunk := stream.read(1 << 20):
            if wanted in before + chunk:
                return True
            before = chunk[-len(wanted) :]
    return False


def _read_file(path: str, columns: list[str]) -> Iterator[UncheckedRow]:
    """Yield the rows of one file, and add the names of its columns to `columns`."""
    if path.endswith(JSON_SUFFIXES):
        with open(path, encoding="utf-8") as stream:
            is_list = stream.read(1) == "["
            stream.seek(0)
            rows = json.load(stream) if is_list else (json.loads(line) for line in stream if line.strip())
            for row in rows:
                if not isinstance(row, dict):
                    raise ValueError(f"a row is {type(row).__name__}, not an object with columns")
                if len(columns) <= 10 * MAX_SHOWN_COLUMNS:
                    columns += [name for name in row if name not in columns]
                yield UncheckedRow.of(row)
    elif path.endswith(".parquet"):
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns += [name for name in names if name not in columns]
        wanted = [name for name in (*COLUMNS, "domain") if name in names]
        if set(wanted) & set(COLUMNS):
            for batch in file.iter_batches(columns=wanted):
                yield from map(UncheckedRow.of, batch.to_pylist())
    elif text := Path(path).read_text(encoding="utf-8"):
        yield UncheckedRow(text=text)
