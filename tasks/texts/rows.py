"""Rows of the texts to calibrate and to measure on, read from files one after another.

A .txt file is one row. Files in JSON, JSON Lines and Parquet have rows with columns, of which `forms.py` makes texts
and chats. Text and JSON may be compressed (.gz, .zst). Memory follows one row, not the file.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import RecipeError, RequantError
from requant.tasks.recipe.quantize_section import COMPRESSIONS
from requant.tasks.texts.forms import (
    COLUMNS,
    READ_COLUMNS,
    Row,
    explain_unusable,
    form_of,
    is_chat,
    parse_row,
    without_surrogates,
)

JSON_SUFFIXES = (".jsonl", ".json")
# A bracket, or a string; `key`: a string that a colon follows.
JSON_TOKEN = re.compile(r'[{}\[\]]|(?P<key>"(?:[^"\\]++|\\.)*+")(?=\s*:)|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
CHAT_COLUMNS = re.compile(f'"({"|".join(name for name in COLUMNS if name != "text")})"'.encode())
MAX_COLUMNS = 200  # that a sentence is told of
MAX_ROW_CHARACTERS = 64 << 20
PARQUET_ROWS, PARQUET_BUFFER_BYTES = 1024, 1 << 20  # how much of a Parquet file is read at once
CHUNK_CHARACTERS = 1 << 20
OpenFile = Callable[[], AbstractContextManager[BinaryIO]]
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
PEEK_CHUNK_BYTES = 1 << 12
# What reading a file raises that is not as its name says. The errors of json, zlib and pyarrow are subclasses of these.
READ_ERRORS = (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, RecursionError, zlib.error)


def read_rows(
    paths: Iterable[str | Path], name: str = "the text", *, chats: bool = False, field: str | None = None
) -> Iterator[Row]:
    """Yield the rows of these files; chats only with `chats`. `field` is the only column to read, if it is given.

    Raises RecipeError, which calls the text `name`, for a file that cannot be read, and if no row of any file can be
    used.
    """
    files = [(path.name, functools.partial(_open, path)) for path in map(Path, paths)]
    for _, row in usable_rows(files, name, chats=chats, field=field):
        yield row


def usable_rows(
    files: Iterable[tuple[str, OpenFile]],
    name: str,
    *,
    chats: bool,
    field: str | None,
    max_characters: int | None = None,
) -> Iterator[tuple[Mapping[str, Any], Row]]:
    """Yield the usable rows of files, each as it is there and as it is read. A file has a name and a way to open it.

    See `raw_rows` for `max_characters`. Raises RecipeError as `read_rows`.
    """
    columns: list[str] = []
    usable = skipped_chats = False
    with _sentences_for(name):
        for file_name, open_file in files:
            with open_file() as stream:
                for unchecked in raw_rows(stream, file_name, columns, field, max_characters):
                    row = parse_row(unchecked, field, chats=chats)
                    if row is not None:
                        usable = True
                        yield unchecked, row
                    skipped_chats = skipped_chats or (not chats and is_chat(unchecked, field))
    if not usable:
        raise RecipeError(explain_unusable(name, columns, field, skipped_chats=skipped_chats))


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


@contextlib.contextmanager
def _sentences_for(name: str) -> Iterator[None]:
    """Raise RecipeError, which calls the text `name`, for what reading a file raises in the block."""
    try:
        yield
    except RequantError:
        raise
    except UnicodeDecodeError as error:
        found = "the mark of UTF-16" if error.object[:2] in UTF_16_MARKS else f"a byte {error.object[error.start]:#x}"
        raise RecipeError(
            f"{name} cannot be read (it is not UTF-8: found {found}): save it as UTF-8, or name another text"
        ) from error
    except READ_ERRORS as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise RecipeError(
            f"{name} cannot be read ({type(error).__name__}: {shown(reason)}): correct the file, or name another text"
        ) from error


def kind_of(path: str) -> str:
    """Return the end of a file's name that says what it holds, without that of a compression."""
    return Path(path.removesuffix(".gz").removesuffix(".zst")).suffix


def columns_of(head: bytes, tail: bytes, suffix: str, *, cut: bool = False) -> tuple[str, ...]:
    """Read the names of a file's columns from its first and last bytes; return none if these are not enough.

    A Parquet file has them at its end, a JSON file in its first row. `cut` says that `head` cannot be made longer: then
    a first row that does not end in it has the columns that begin in it, if they make a form.
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
                return columns if form_of(columns) is not None else ()
    return ()


def lists_of(head: bytes, tail: bytes, suffix: str) -> tuple[str, ...]:
    """Read which columns of a file hold lists, as `columns_of` reads their names; of a cut row, none."""
    with contextlib.suppress(*READ_ERRORS):
        if suffix == ".parquet":
            import pyarrow.parquet

            schema = pyarrow.parquet.read_metadata(io.BytesIO(tail)).schema.to_arrow_schema()
            types = pyarrow.types
            are_lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
            return tuple(column.name for column in schema if any(is_one(column.type) for is_one in are_lists))
        text = head.decode("utf-8", errors="ignore").lstrip().removeprefix("[").lstrip()
        row = json.JSONDecoder().raw_decode(text)[0]
        return tuple(name for name, value in row.items() if isinstance(value, list))
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


def needs_template(paths: Iterable[str | Path], field: str | None = None) -> bool:
    """Check whether a row of these files is a chat. A file that cannot be read has no such row."""
    for path in map(Path, paths):
        with contextlib.suppress(*READ_ERRORS):
            kind = kind_of(path.name)
            if kind == ".txt" or (kind in JSON_SUFFIXES and field is None and not _may_have_chats(path)):
                continue
            with path.open("rb") as stream:
                if any(is_chat(row, field) for row in raw_rows(stream, path.name, [], field)):
                    return True
    return False


def _may_have_chats(path: Path) -> bool:
    """Check whether a file has the name of a column of chats, which is far cheaper than reading its rows."""
    before = b""
    with path.open("rb") as stream:
        plain = decompressed(stream, path.name)
        while chunk := plain.read(CHUNK_CHARACTERS):
            if CHAT_COLUMNS.search(before + chunk):
                return True
            before = chunk[-50:]
    return False


def raw_rows(
    stream: BinaryIO, name: str, columns: list[str], field: str | None = None, max_characters: int | None = None
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of one file as they are there, and add the names of its columns to `columns`.

    Halves of surrogate pairs alone, which JSON can escape, are replaced by U+FFFD.

    Of a Parquet file, rows have only the columns that `parse_row` reads. Of a .txt file, at most `max_characters` are
    read. Raises one of READ_ERRORS for a file that cannot be read.
    """
    kind = kind_of(name)
    if kind == ".parquet":
        yield from _parquet_rows(stream, columns, field)
        return
    text = io.TextIOWrapper(cast(Any, decompressed(stream, name)), encoding="utf-8")
    if kind not in JSON_SUFFIXES:
        if content := text.read(max_characters):
            if "text" not in columns:
                columns.append("text")
            yield {field or "text": content}
        return
    for row in map(without_surrogates, _json_rows(text)):
        if not isinstance(row, dict):
            raise ValueError(f"a row is {type(row).__name__}, not an object with columns")
        if len(columns) <= MAX_COLUMNS:
            columns += [name for name in row if name not in columns]
        yield row


def decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    """Return a stream of what a file holds, decompressed as its name says."""
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))
    if name.endswith(".zst"):
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd")))
    return stream


def decompressed_beginning(head: bytes, name: str, max_bytes: int) -> bytes:
    """Return what the first bytes of a file hold, decompressed as its name says, and cut at `max_bytes`."""
    if not name.endswith(COMPRESSIONS):
        return head[:max_bytes]
    found = bytearray()
    with contextlib.suppress(*READ_ERRORS):  # the end of the file is missing
        plain = decompressed(io.BytesIO(head), name)
        while len(found) < max_bytes and (chunk := plain.read(PEEK_CHUNK_BYTES)):
            found += chunk
    return bytes(found[:max_bytes])


def _parquet_rows(stream: BinaryIO, columns: list[str], field: str | None) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet

    # Without pre_buffer, a column is read as far as its rows are, and not for a whole row group at once.
    file = pyarrow.parquet.ParquetFile(stream, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
    names = file.schema_arrow.names
    columns += [name for name in names if name not in columns]
    wanted = [name for name in names if name in READ_COLUMNS or name == field]
    if field in wanted if field is not None else form_of(wanted) is not None:
        for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
            yield from batch.to_pylist()


def _json_rows(stream: TextIO) -> Iterator[object]:
    """Yield the values of JSON Lines, or of a file that is one list."""
    first = stream.read(1)
    if first == "[":
        yield from _list_entries(stream)
        return
    while line := first + stream.readline(MAX_ROW_CHARACTERS):
        if len(line) >= MAX_ROW_CHARACTERS:
            raise ValueError(f"a row has over {MAX_ROW_CHARACTERS:,} characters")
        first = ""
        if line.strip():
            yield json.loads(line)


def _list_entries(stream: TextIO) -> Iterator[object]:
    """Yield the entries of a JSON list behind its opening bracket, with one of them in memory at a time."""
    decoder, text, begin, ended = json.JSONDecoder(), "", 0, False
    while True:
        while begin < len(text) and text[begin] in " \t\n\r,":
            begin += 1
        if text.startswith("]", begin):
            return
        try:
            entry, end = decoder.raw_decode(text, begin)
        except ValueError:
            end = len(text)
            entry = None
        if end < len(text) or (ended and entry is not None):  # a number at the end of the text may go on
            yield entry
            begin = end
            continue
        if ended:
            json.loads(f"[{text[begin:]}")  # raises, and says why
            raise ValueError("the list does not end")
        if len(text) - begin > MAX_ROW_CHARACTERS:
            raise ValueError(f"a row has over {MAX_ROW_CHARACTERS:,} characters")
        more = stream.read(max(CHUNK_CHARACTERS, len(text) - begin))
        text, begin, ended = text[begin:] + more, 0, not more
