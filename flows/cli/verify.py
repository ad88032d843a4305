"""`requant verify`: check that a published repo is what its manifest claims."""

from __future__ import annotations

import click

from requant.flows import api
from requant.flows.cli.command import CommandResult, command
from requant.tasks.artifact import RELEASE


@command("verify")
@click.argument("release", metavar="RELEASE")
@click.option("--deep", is_flag=True, help="Fetch and hash every byte of a repo. Nothing is kept.")
def verify(release: str, deep: bool) -> CommandResult:
    """Check that a release is what its requant.json claims.

    RELEASE is repo_id[@revision], or a folder to which a release was downloaded. Of a repo, the Hub's file list,
    headers and small files are fetched, but no weights. Of a folder, every byte is read. Exit status 1: there are
    problems.

    \b
    Examples:
      requant verify YOU/Qwen3.6-27B-int4-AutoRound
      requant verify YOU/Qwen3.6-27B-int4-AutoRound@TAG --deep
      requant verify downloads/Qwen3.6-27B-int4-AutoRound
    """
    document = api.verify(release, deep=deep)
    where = document.repo_id if document.commit is None else f"{document.repo_id}@{document.commit[:7]}"
    head = f"{where}: release {document.release or 'unknown'}, {document.files} files"
    lines = [f"problem  {problem}" for problem in document.problems] or [f"as {RELEASE} claims"]
    return CommandResult(document.to_json(), "\n".join([head, *lines]), 1 if document.problems else 0)
