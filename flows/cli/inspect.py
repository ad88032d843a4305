"""`requant inspect`: describe a checkpoint from its headers and config."""

from __future__ import annotations

import click

from requant.flows import api
from requant.flows.cli.command import CommandResult, command


@command("inspect")
@click.argument("checkpoint")
@click.option(
    "--deep",
    is_flag=True,
    help="Read the tensors too, and find NaN values, scales of zero and lossy MTP heads. A repo is downloaded into the "
    "store for that.",
)
def inspect(checkpoint: str, deep: bool) -> CommandResult:
    """Say how a checkpoint is quantized and where its MTP head works.

    CHECKPOINT is a folder, or repo_id[@revision], of which a few hundred KB are fetched. Headers and configs are
    enough to say what is quantized how, what is wrong, and whether each engine will load the checkpoint and draft
    with its MTP head. Exit status 1: the checkpoint has problems.

    \b
    Examples:
      requant inspect Qwen/Qwen3.6-27B
      requant inspect build/result --deep
    """
    from requant.tasks.checkpoint.inspect import as_text

    document = api.inspect(checkpoint, deep=deep)
    return CommandResult(document.to_json(), as_text(checkpoint, document), 1 if document.problems else 0)
