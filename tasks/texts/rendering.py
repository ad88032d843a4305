"""Chats rendered as a model reads them: rows of `messages` go through the chat template of the base.

A chat template is a program that a stranger wrote. It runs in a process of its own (rendering_child.py), in the sandbox
of transformers, with bounds on time and memory. Without a template, or if it fails, a chat is rendered as
`role: content`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from requant.tasks.environment import with_package
from requant.tasks.errors import SECRET_VARIABLES, CheckpointError, RecipeError, RenderingTimeout
from requant.tasks.texts.rendering_child import RenderingAnswer, RenderingJob

# Wall-clock time depends on the machine and not on the text, so that a rendering that takes too long is tried again.
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class ReadingLimit:
    """After how many tokens or characters reading ends; None: it does not end before the text does.

    field: the only column to read, if there is one; sample_tokens: the length of the samples that the text is read for.
    """

    tokens: int | None = None
    characters: int | None = None
    field: str | None = None
    sample_tokens: int | None = None


@dataclass(frozen=True)
class Rendered:
    """A rendered text.

    path: a file of documents (documents.py); rows: how many there are; tokens: how many they have, by domain;
    templated, plain: how many chats went through the chat template, and how many are `role: content`; reason: why the
    first plain one is plain.
    """

    path: Path
    tokens: dict[str, int]
    templated: int
    plain: int
    reason: str
    rows: int = 0

    @property
    def summary(self) -> str:
        """How the chats were rendered, for the log; empty where there are none."""
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
    limit: ReadingLimit | None = None,
) -> Rendered:
    """Render the rows of these files with the tokenizer of `model`, into a file in `folder`.

    Raises RecipeError for rows that cannot be used, CheckpointError for a tokenizer that cannot be loaded,
    RenderingTimeout (retryable) after TIMEOUT_S seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = limit or ReadingLimit()
    job = RenderingJob(
        model=str(model.absolute()),
        paths=[str(path.absolute()) for path in paths],
        out=str(folder.absolute() / "documents.jsonl"),
        name=name,
        chats=chats,
        remote_code=remote_code,
        max_tokens=limit.tokens,
        max_characters=limit.characters,
        field=limit.field,
        sample_tokens=limit.sample_tokens,
    )
    return _render(job, folder)


def render_prompts(model: Path, path: Path, folder: Path, *, remote_code: bool = False) -> Rendered:
    """Render the chats of a file up to where the model is to answer. Those that its template refuses are left out.

    Raises what `render` raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = RenderingJob(
        model=str(model.absolute()),
        paths=[str(path.absolute())],
        out=str(folder.absolute() / "documents.jsonl"),
        name="the prompts",
        chats=True,
        remote_code=remote_code,
        prompts=True,
    )
    return _render(job, folder)


def _render(job: RenderingJob, folder: Path) -> Rendered:
    answer = _run(job, folder)
    if answer is None:
        answer = _run(replace(job, no_template="the base's chat template did not end"), folder)
    if answer is None:
        raise CheckpointError(f"reading {job.name} took too long even without the base's chat template")
    if answer.recipe_error:
        raise RecipeError(answer.recipe_error)
    if answer.checkpoint_error:
        raise CheckpointError(answer.checkpoint_error)
    return Rendered(Path(job.out), answer.tokens, answer.templated, answer.plain, answer.reason, answer.rows)


def _run(job: RenderingJob, folder: Path) -> RenderingAnswer | None:
    """Run the child, and return its answer; None if the kernel ended it because its template took too much CPU time."""
    job_path = folder.absolute() / "rendering.json"
    job_path.write_text(job.to_json())
    environment = {k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # transformers would warn that there is no torch, and the warning would hide why the child ended early.
    environment |= {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "requant.tasks.texts.rendering_child", str(job_path)],
            cwd=folder,
            env=with_package(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise RenderingTimeout(
            f"reading {job.name} took over {TIMEOUT_S:g} s: try again on a machine that is less busy, or name a "
            "smaller text"
        ) from error
    if done.returncode == -signal.SIGPROF:
        return None
    try:
        return RenderingAnswer.from_json(done.stdout.splitlines()[-1])
    except (ValueError, TypeError, IndexError) as error:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        raise CheckpointError(f"the process that reads {job.name} ended early: {last[:300]}") from error
