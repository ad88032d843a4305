"""What the rows of a base begin with.

The prompts in texts/builtin/self-prompts.jsonl (CC0) are chats, some with tools, and beginnings of texts. A base with a
chat template answers the chats, in its own template and with its tool syntax; another base goes on with the beginnings.
Besides, both write from the token that begins a text, if there is one: as they were trained, without any prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from requant.tasks.artifact import sha256_of
from requant.tasks.checkpoint.checkpoint import read_json
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.errors import RecipeError
from requant.tasks.texts.rendering import render_prompts
from requant.tasks.texts.text import BUILTIN_FOLDER
from requant.tasks.writing.rows import Start

PROMPTS = BUILTIN_FOLDER / "self-prompts.jsonl"
NO_PROMPT = "no prompt"  # the domain of rows that begin with the token that begins a text
MIN_ANSWER_SHARE = 0.5  # of a row: a prompt that leaves less room is not used


def digest_of_prompts() -> str:
    """Return the digest of the prompts, which the stage key names."""
    return sha256_of(PROMPTS)


def find_starts(
    model: Path, tokenizer: Any, folder: Path, *, row_tokens: int, remote_code: bool = False
) -> tuple[list[Start], str]:
    """Return what rows begin with, and in a sentence what that is.

    `model` has the base's tokenizer and chat template, and `tokenizer` is the former, loaded. The files of the rendered
    prompts are written to `folder`. Raises RecipeError if no prompt is short enough, and what `render_prompts` raises.
    """
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    chats = _select(lines, "messages", folder / "chats.jsonl")
    rendered = render_prompts(model, chats, folder / "rendered", remote_code=remote_code)
    used = rendered.path if rendered.templated else _select(lines, "text", folder / "beginnings.jsonl")
    starts = []
    for line in used.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = tokenizer(row["text"], add_special_tokens=not rendered.templated)["input_ids"]
        starts.append(Start(row["domain"], tuple(ids)))
    fitting = [start for start in starts if 0 < len(start.tokens) <= MIN_ANSWER_SHARE * row_tokens]
    if not fitting:
        raise RecipeError(
            f"quantize.seqlen {row_tokens} leaves no room for the prompts of calibration self: raise it, or name "
            "another text as quantize.calibration"
        )
    too_long = f"; {len(starts) - len(fitting)} are too long" if len(fitting) < len(starts) else ""
    if (first := first_id(model, tokenizer)) is not None:
        fitting.append(Start(NO_PROMPT, (first,)))
    what = f"{rendered.templated} chats through the base's chat template" if rendered.templated else "beginnings"
    refused = f"; its template refuses {rendered.plain} more" if rendered.templated and rendered.plain else ""
    return fitting, f"{what}{refused}{too_long}"


def first_id(model: Path, tokenizer: Any) -> int | None:
    """Return the id of the token that begins a text: the tokenizer's, or that of the config; None without one."""
    first = tokenizer.bos_token_id
    first = ModelConfig(read_json(model / "config.json")).text.get("bos_token_id") if first is None else first
    return first if type(first) is int and 0 <= first < len(tokenizer) else None


def _select(lines: Iterable[str], column: str, path: Path) -> Path:
    """Write the prompts that have a column to a file."""
    chosen = [line for line in lines if column in json.loads(line)]
    write_file(path.parent, path.name, (f"{line}\n".encode() for line in chosen))
    return path
