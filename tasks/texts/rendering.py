"""Chats as a model is given them: rows of `messages` through the chat template of the base.

A chat template is a program that a stranger wrote. It runs in a process of its own (rendering_child.py), in the sandbox
of transformers, with bounds on time and memory. Where there is no template, or it fails, a chat is `role: content`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.tasks.environment import with_package
from requant.tasks.errors import SECRET_VARIABLES, CheckpointError, RecipeError, RenderingTimeout

TIMEOUT_S = 3600.0  # of the clock, which says nothing of the text: the same is tried again
# What a tokenizer and its chat template are made of, beside config.json.
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*")
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
)  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """Documents, one JSON row of `text` and `domain` each, and the tokens that they have, by domain.

    `templated` and `plain` count the chats; `reason` says why the first plain one is plain.
    """

    path: Path
    tokens: dict[str, int]
    templated: int
    plain: int
    reason: str

    @property
    def summary(self) -> str:
        """Say what became of the chats, for the log; nothing where there are none."""
        if not self.templated and not self.plain:
            return ""
        plain = f"; {self.plain} as plain `role: content` ({self.reason})" if self.plain else ""
        return f"{self.templated} chats through the base's chat template{plain}"

    def to_json(self) -> dict[str, Any]:
        return {"templated": self.templated, "plain": self.plain, "reason": self.reason or None}


def render(
    model: Path,
    paths: Sequence[Path],
    folder: Path,
    *,
    name: str = "the text",
    chats: bool = True,
    remote_code: bool = False,
    most_tokens: int | None = None,
    most_characters: int | None = None,
) -> Rendered:
    """Render the rows of these files with the tokenizer of `model`, into a file below `folder`.

    Reading ends after `most_tokens` or `most_characters`. Raises RecipeError for rows that cannot be used,
    CheckpointError for a tokenizer that cannot be loaded, RenderingTimeout (retryable) if the clock ends it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "model": str(model.absolute()), "paths": [str(path.absolute()) for path in paths], "name": name, "chats": chats,
        "remote_code": remote_code, "most_tokens": most_tokens, "most_characters": most_characters,
        "out": str(folder.absolute() / "documents.jsonl"), "template": True, "reason": "",
    }  # fmt: skip
    found = _run(job, folder)
    if found is None:  # the kernel ended it in the middle of a template that does not come back to Python
        job |= {"template": False, "reason": "the base's chat template did not end"}
        found = _run(job, folder)
    if found is None:
        raise CheckpointError(f"reading {name} took too long even without the base's chat template")
    if problem := found.get("recipe"):
        raise RecipeError(problem)
    if problem := found.get("checkpoint"):
        raise CheckpointError(problem)
    return Rendered(Path(found["out"]), found["tokens"], found["templated"], found["plain"], found["reason"])


def _run(job: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Run the child; its answer, or None if its template took more CPU time than it may."""
    (folder / "rendering.json").write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}  # that there is no torch would be its last word
    command = [sys.executable, "-m", "requant.tasks.texts.rendering_child", str(folder.absolute() / "rendering.json")]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=with_package(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise RenderingTimeout(
            f"reading {job['name']} took over {TIMEOUT_S:g} s: try again on a machine that is less busy, or name a "
            "smaller text"
        ) from error
    if done.returncode == -signal.SIGPROF:
        return None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        raise CheckpointError(f"the process that reads {job['name']} ended early: {last[:300]}") from error
    return answer
