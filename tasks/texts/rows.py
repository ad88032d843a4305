"""Rows of the texts to calibrate and to measure on: `text`, or `messages` of a chat.

Text files (.txt) are one row each; .jsonl, .json and .parquet files have rows with columns. A row's `text` counts where
it has both; a row whose `text` is empty, as published data sets have them, is passed over.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import RecipeError

COLUMNS = ("text", "messages")
JSON = (".jsonl", ".json")
# A bracket, or a string; `key`: one that a colon follows.
JSON_TOKEN = re.compile(r'[{}\[\]]|(?P<key>"(?:[^"\\]++|\\.)*+")(?=\s*:)|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
MAX_SHOWN_COLUMNS = 20  # named in a sentence
MAX_MESSAGES = 10_000  # of one row


@dataclass(frozen=True)
class Row:
    """One document: a text, or the messages of a chat, and the domain that a mixed text names."""

    text: str = ""
    messages: Sequence[Mapping[str, Any]] = ()
    domain: str = ""

    @property
    def characters(self) -> int:
        """Count the characters of what it says, without those that a chat template adds."""
        return len(self.text) + sum(len(content_of(message)) for message in self.messages)


def read_rows(paths: Iterable[str | Path], name: str = "the text", *, chats: bool = False) -> Iterator[Row]:
    """Read the documents of these files one after another; rows of `messages` only with `chats`.

    Raises RecipeError with a sentence for files that cannot be read, and for files of which no row can be used, which
    names the columns that are there. `name` is what the sentence calls the text.
    """
    columns: list[str] = []
    found = unread = False
    try:
        for path in map(str, paths):
            for document in _documents(path, columns):
                row = row_of(document, chats=chats)
                if row is not None:
                    found = True
                    yield row
                unread = unread or (not chats and bool(document.get(COLUMNS[1])))
    except RecipeError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        # JSON's and Arrow's own errors are among these.
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise RecipeError(
            f"{name} cannot be read ({type(error).__name__}: {shown(reason)}): correct the file, or name another text"
        ) from error
    if not found:
        raise RecipeError(unusable(name, columns, unread=unread))


def unusable(name: str, columns: Sequence[str], *, unread: bool = False) -> str:
    """Say which columns a text has, of which no row can be used. `unread`: it has messages, and chats were not read."""
    if not columns:
        return f"{name} is empty: name a text with rows of {' or '.join(COLUMNS)}"
    told = ", ".join(shown(column) for column in columns[:MAX_SHOWN_COLUMNS])
    more = f" and {len(columns) - MAX_SHOWN_COLUMNS} more" if len(columns) > MAX_SHOWN_COLUMNS else ""
    if unread:
        return (
            f"the rows of {name} (columns {told}{more}) hold no text, and their messages are not read: a data set has "
            "chats if the first row of its first file has messages and no text column: mend that row, or "
            "name another text"
        )
    if set(columns) & set(COLUMNS):
        return f"the rows of {name} (columns {told}{more}) hold nothing in {' or '.join(COLUMNS)}: name another text"
    return (
        f"the rows of {name} have the columns {told}{more}; a row needs {' or '.join(COLUMNS)}: "
        "rename a column, or name another text"
    )


def row_of(document: Mapping[str, Any], *, chats: bool) -> Row | None:
    """Turn a row as it was read into a document; None where it has neither a text nor, with `chats`, messages."""
    text, messages = document.get("text"), document.get("messages") if chats else None
    domain = document.get("domain")
    domain = domain if isinstance(domain, str) else ""
    if text:
        if not isinstance(text, str):
            raise ValueError(f"a row has {type(text).__name__} as text, not a string")
        return Row(text=text, domain=domain)
    if not messages:
        return None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError('messages of a row must be a list of {"role": ..., "content": ...}')
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"a row has {len(messages):,} messages, and at most {MAX_MESSAGES:,} are read")
    return Row(messages=messages, domain=domain)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def content_of(message: Mapping[str, Any]) -> str:
    """Give the words of a message: its content, or the parts of it that are text."""
    content = message.get("content")
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def plain_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Render a chat without a template: `role: content`, one message after another."""
    return "\n\n".join(f"{message['role']}: {content_of(message)}" for message in messages)


def columns_of(head: bytes, tail: bytes, suffix: str, *, cut: bool = False) -> tuple[str, ...]:
    """Tell the columns of a file from its first and last bytes; none where these do not tell.

    `cut`: the first row may end behind `head`; then its columns are those that begin in it, if a row needs one of them.
    """
    with contextlib.suppress(OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        if suffix == ".parquet":
            import pyarrow.parquet

            return tuple(pyarrow.parquet.read_metadata(io.BytesIO(tail)).schema.to_arrow_schema().names)
        if suffix in JSON:
            text = head.decode("utf-8", errors="ignore").lstrip()  # the last character may be cut
            text = text[1:].lstrip() if text.startswith("[") else text
            try:
                row = json.JSONDecoder().raw_decode(text)[0]
                return tuple(row) if isinstance(row, dict) else ()
            except ValueError:
                columns = _begun(text) if cut else ()
                return columns if set(columns) & set(COLUMNS) else ()
    return ()


def _begun(row: str) -> tuple[str, ...]:
    """List the keys of a JSON object that is cut somewhere, as far as it goes."""
    keys, depth = [], 0
    for match in JSON_TOKEN.finditer(row):
        token = match[0]
        depth += (token in "{[") - (token in "}]")
        if depth < 1:
            break
        if depth == 1 and match["key"] is not None:
            keys.append(json.loads(match["key"]))
    return tuple(keys)


def needs_template(paths: Iterable[str | Path]) -> bool:
    """Tell whether some row of these files has messages and no text; what cannot be read has none."""
    for path in map(str, paths):
        with contextlib.suppress(OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
            if path.endswith(JSON) and not _mentions(path, b'"messages"'):
                continue
            if path.endswith(".txt"):
                continue
            if any(not row.get("text") and row.get("messages") for row in _documents(path, [])):
                return True
    return False


def _mentions(path: str, word: bytes) -> bool:
    """Tell whether a file holds these bytes: far cheaper than reading its rows."""
    with open(path, "rb") as stream:
        before = b""
        while chunk := stream.read(1 << 20):
            if word in before + chunk:
                return True
            before = chunk[-len(word) :]
    return False


def _documents(path: str, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    """Read the rows of one file; the names of its columns are added to `columns`."""
    if path.endswith(JSON):
        with open(path, encoding="utf-8") as stream:
            is_list = stream.read(1) == "["
            stream.seek(0)
            rows = json.load(stream) if is_list else (json.loads(line) for line in stream if line.strip())
            for row in rows:
                if not isinstance(row, dict):
                    raise ValueError(f"a row is {type(row).__name__}, not an object with columns")
                if len(columns) <= 10 * MAX_SHOWN_COLUMNS:
                    columns += [name for name in row if name not in columns]
                yield row
    elif path.endswith(".parquet"):
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns += [name for name in names if name not in columns]
        read = [name for name in (*COLUMNS, "domain") if name in names]
        if set(read) & set(COLUMNS):
            for batch in file.iter_batches(columns=read):
                yield from batch.to_pylist()
    elif text := Path(path).read_text(encoding="utf-8"):
        yield {"text": text}
