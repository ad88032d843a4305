"""The stage excerpt: the first rows of a Hub data set, as many as are needed, read without fetching whole files.

Of Parquet files, only the row groups and columns that are read are sent, and of other files only their beginnings. The
rows are kept in the store, so the data set is read once, by the machine that plans the run, and every output and every
worker gets the same rows. A killed stage begins anew: an excerpt has a few megabytes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from requant.tasks.artifact import File, Manifest, file_of
from requant.tasks.hub.remote_file import RemoteFile
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.store import Store
from requant.tasks.texts.forms import READ_COLUMNS
from requant.tasks.texts.rows import OpenFile, usable_rows
from requant.tasks.texts.text import MAX_CHARACTERS_PER_TOKEN, Text, has_rows, local_files

STAGE = Stage("excerpt", 1)
EXCERPT = "rows.jsonl"
# How many characters of rows an excerpt has at least. A larger need is rounded up to a power of two, so that outputs
# with other numbers of samples share an excerpt.
MIN_CHARACTERS = 1 << 24
# How much of a chat counts: of a chat longer than a sample, little may be in a sample (`Document.sample_tokens`).
MAX_CHAT_CHARACTERS = 1 << 14
log = logging.getLogger(__name__)


def excerpt_key(text: Text, characters: int) -> str:
    return STAGE.key(reads={"text": text.digest}, settings={"characters": characters})


def characters_for(tokens: int) -> int:
    """Return how many characters an excerpt must have that is read for so many tokens."""
    return max(MIN_CHARACTERS, 1 << (MAX_CHARACTERS_PER_TOKEN * tokens - 1).bit_length())


def excerpt(store: Store, text: Text, tokens: int = 0) -> StageResult:
    """Keep the first rows of a Hub data set in the store: those that have so many tokens, and MIN_CHARACTERS at least.

    Raises RecipeError for rows that cannot be used, HubError, HubUnavailable.
    """
    assert text.dataset is not None
    dataset, characters = text.dataset, characters_for(tokens)

    def work(folder: Path) -> Made:
        remote: list[RemoteFile] = []
        files: list[tuple[str, OpenFile]] = [
            (file.path, functools.partial(_open, store, dataset, file, folder / "stored", remote))
            for file in dataset.files
            if has_rows(file.path)
        ]
        (folder / "out").mkdir(exist_ok=True)
        rows = _write_rows(text, files, folder / "out" / EXCERPT, characters)
        manifest = Manifest.of([file_of(folder / "out", EXCERPT)])
        put_files(store, folder / "out", [*manifest.files])
        bytes_moved = sum(file.bytes_read for file in remote)
        log.info(f"read {rows:,} rows of {text.name}: {bytes_moved:,} bytes")
        return Made(manifest, {"text": text.name, "rows": rows, "bytes_moved": bytes_moved})

    return run_stage(store, STAGE, excerpt_key(text, characters), work)


def text_files(store: Store, text: Text, folder: Path, tokens: int = 0) -> list[Path]:
    """List the files of a text that have rows.

    Of a data set, that is a file in `folder` with its first rows, which have `tokens` tokens if there are as many.
    """
    if text.path is not None:
        return local_files(text.path)
    if text.written is not None:
        store.link_files(text.written, folder)
        return [folder / file.path for file in text.written.files if has_rows(file.path)]
    store.link_files(excerpt(store, text, tokens).manifest, folder)
    return [folder / EXCERPT]


def _write_rows(text: Text, files: Iterable[tuple[str, OpenFile]], out: Path, most: int) -> int:
    """Write rows until they have so many characters, with the columns that are read. Return how many there are."""
    rows = characters = 0
    columns = {*READ_COLUMNS, text.field}
    with out.open("w", encoding="utf-8") as stream:
        for raw, row in usable_rows(files, text.label, chats=text.chats, field=text.field, max_characters=most):
            kept = {name: value for name, value in raw.items() if name in columns and value is not None}
            stream.write(json.dumps(kept, default=_nothing) + "\n")
            rows += 1
            characters += min(row.characters, MAX_CHAT_CHARACTERS) if row.messages else row.characters
            if characters >= most:
                break
    return rows


def _nothing(value: Any) -> None:
    """Stand for a value that JSON cannot hold, as the bytes of an image in a message."""


@contextlib.contextmanager
def _open(store: Store, dataset: Revision, file: HubFile, folder: Path, remote: list[RemoteFile]) -> Iterator[BinaryIO]:
    """Open a file of a data set, from the store if an earlier version of Requant has fetched it."""
    if file.sha256 and store.has_blob(stored := File(file.path, file.size, file.sha256)):
        with (store.link_files(Manifest.of([stored]), folder) / file.path).open("rb") as local:
            yield local
        return
    remote.append(RemoteFile(dataset, file))
    with remote[-1].open() as opened:
        yield opened
