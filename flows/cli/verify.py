"""`requant verify`: check that a published repo is what its manifest claims."""

from __future__ import annotations

import click

from requant.flows import api
from requant.flows.cli.command import CommandResult, command
from requant.tasks.artifact import RELEASE


@command("verify")
@click.argument("repo")
@click.option("--deep", is_flag=True, help="Fetch and hash every byte. Nothing is kept.")
def verify(repo: str, deep: bool) -> CommandResult:
    """Check that a published repo is what its requant.json claims.

    REPO is repo_id[@revision]. The Hub's file list, headers and small files are fetched, but no weights.
    Exit status 1: the repo has problems.

    \b
    Examples:
      requant verify YOU/Qwen3.6-27B-int4-AutoRound
      requant verify YOU/Qwen3.6-27B-int4-AutoRound@TAG --deep
    """
    document = api.verify(repo, deep=deep)
    where = f"{document.repo_id}@{document.commit[:7]}"
    head = f"{where}: release {document.release or 'unknown'}, {document.files} files"
    lines = [f"problem  {problem}" for problem in document.problems] or [f"as {RELEASE} claims"]
    return CommandResult(document.to_json(), "\n".join([head, *lines]), 1 if document.problems else 0)
