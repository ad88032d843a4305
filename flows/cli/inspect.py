"""`requant inspect`: what a checkpoint is, from its headers and config."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from requant.flows.cli.arguments import resolve_repo
from requant.flows.cli.command import command
from requant.tasks.errors import RequantError


@command("inspect")
@click.argument("checkpoint")
@click.option(
    "--deep",
    is_flag=True,
    help="Read the tensors of a folder too, and find NaN values, scales of zero and lossy MTP heads.",
)
def inspect(checkpoint: str, deep: bool) -> tuple[dict[str, Any], str, int]:
    """Say how a checkpoint is quantized and where its MTP head works.

    CHECKPOINT is a folder, or repo_id[@revision], of which a few hundred KB are fetched. Headers and configs are
    enough to say what is quantized how, what is wrong, and whether each engine will load the checkpoint and draft
    with its MTP head. Exit status 1: the checkpoint has problems.

    \b
    Examples:
      requant inspect Qwen/Qwen3.6-27B
      requant inspect build/result --deep
    """
    from requant.tasks.checkpoint.inspect import as_text, inspect_checkpoint

    if Path(checkpoint).is_dir():
        result = inspect_checkpoint(Path(checkpoint), deep=deep)
    elif deep:
        raise RequantError(f"--deep reads the data of a folder, and {checkpoint} is none: download it first")
    else:
        from requant.tasks.hub.sparse_checkout import create_checkout

        with tempfile.TemporaryDirectory(prefix="requant-") as folder:
            result = inspect_checkpoint(create_checkout(resolve_repo(checkpoint), Path(folder)))
    return result, as_text(checkpoint, result), 1 if result["problems"] else 0
