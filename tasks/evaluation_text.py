"""Prepare the evaluation text: the file that a checkpoint is measured on, and on which its drafts are counted."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from requant.tasks.checkpoint.writer import write_file
from requant.tasks.errors import RecipeError
from requant.tasks.excerpt import text_files
from requant.tasks.recipe.recipe import DOMAIN
from requant.tasks.store import Store
from requant.tasks.texts.rendering import ReadingLimit, render
from requant.tasks.texts.rows import read_rows
from requant.tasks.texts.text import Text
from requant.tasks.validating import OTHER, WHOLE_TEXT

MAX_CHARACTERS = 4_000_000  # Read at most this many characters of a data set; windows are spread over these.
MAX_DOMAINS = 16  # domains beyond these, and those whose names are no names, are measured together
DOMAIN_NAME = re.compile(DOMAIN)
log = logging.getLogger(__name__)


def text_for_measuring(
    store: Store,
    text: Text,
    folder: Path,
    model: Path,
    remote_code: bool = False,
) -> Path:
    """Return a file with the text to measure on: plain text, or JSON Lines with a row for each domain.

    A local .txt file is returned as it is. Of any other text, the first MAX_CHARACTERS are written to a file in
    `folder`; chats are rendered with the chat template of `model`. Raises RecipeError if there is no text to read.
    """
    if text.path is not None and text.path.suffix == ".txt":
        return text.path
    domains = _by_domain(store, text, folder, model, remote_code)
    if domains.keys() == {WHOLE_TEXT}:
        write_file(folder, "text.txt", [domains[WHOLE_TEXT].encode()])
        return folder / "text.txt"
    rows = (json.dumps({"domain": domain, "text": content}) + "\n" for domain, content in domains.items())
    write_file(folder, "text.jsonl", (row.encode() for row in rows))
    return folder / "text.jsonl"


def _by_domain(store: Store, text: Text, folder: Path, model: Path, remote_code: bool) -> dict[str, str]:
    """Read the text of each domain, WHOLE_TEXT for rows without one. Raises RecipeError if there is no text to read."""
    if text.domains:
        return {
            domain: "\n\n".join(_by_domain(store, part, folder / domain, model, remote_code).values())
            for domain, part in text.domains
        }
    paths = text_files(store, text, folder / "text")
    documents: dict[str, list[str]] = {}
    characters = 0
    try:
        if text.chats:
            rendered = render(
                model,
                paths,
                folder / "rendered",
                name=text.name,
                remote_code=remote_code,
                limit=ReadingLimit(characters=MAX_CHARACTERS),
            )
            log.info(f"validation text: {rendered.summary}")
            paths = [rendered.path]
        for row in read_rows(paths, text.name):
            domain = row.domain or WHOLE_TEXT
            if domain not in documents and (len(documents) >= MAX_DOMAINS or not DOMAIN_NAME.fullmatch(domain)):
                domain = OTHER
            documents.setdefault(domain, []).append(row.text[: MAX_CHARACTERS - characters])
            characters += len(row.text)
            if characters >= MAX_CHARACTERS:
                break
    except RecipeError as error:
        raise RecipeError(f"validation.text: {error}") from error
    return {domain: "\n\n".join(texts) for domain, texts in documents.items()}
