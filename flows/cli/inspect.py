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
@click.option("--deep", is_flag=True, help="Read the data too: values that are no numbers, lossy heads. Folders only.")
def inspect(checkpoint: str, deep: bool) -> tuple[dict[str, Any], str, int]:
    """Say from headers and config alone what is quantized how, and whether MTP will work in each engine.

    CHECKPOINT is a folder, or repo_id[@revision], of which a few hundred KB are fetched. Exit status 1: problems.
    """
    from requant.tasks.checkpoint.inspect import as_text, inspect_checkpoint

    if Path(checkpoint).is_dir():
        result = inspect_checkpoint(Path(checkpoint), deep=deep)
    elif deep:
        raise RequantError(f"--deep reads the data of a folder, and {checkpoint} is none: download it first")
    else:
        from requant.tasks.hub.sparse_checkout import lay_out

        with tempfile.TemporaryDirectory(prefix="requant-") as folder:
            result = inspect_checkpoint(lay_out(resolve_repo(checkpoint), Path(folder)))
    return result, as_text(checkpoint, result), 1 if result["problems"] else 0
