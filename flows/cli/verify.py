"""`requant verify`: whether a published repo is what its manifest claims."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from requant.flows.cli.arguments import check_repo_id
from requant.flows.cli.command import command
from requant.tasks.artifact import RELEASE


@command("verify")
@click.argument("repo")
@click.option("--deep", is_flag=True, help="Fetch and hash every byte. Nothing is kept.")
def verify(repo: str, deep: bool) -> tuple[dict[str, Any], str, int]:
    """Check that a published repo is what its requant.json claims.

    REPO is repo_id[@revision]. The Hub's file list, headers and small files are fetched, but no weights.
    Exit status 1: the repo has problems.

    \b
    Examples:
      requant verify YOU/Qwen3.6-27B-int4-AutoRound
      requant verify YOU/Qwen3.6-27B-int4-AutoRound@TAG --deep
    """
    from requant.tasks.hub.verify import verify_release

    repo_id, _, revision = repo.partition("@")
    found = verify_release(check_repo_id(repo_id), revision or "main", deep=deep)
    head = f"{repo_id}@{found.commit[:7]}: release {found.release or 'unknown'}, {found.files} files"
    lines = [f"problem  {problem}" for problem in found.problems] or [f"as {RELEASE} claims"]
    document = {"repo_id": repo_id, "deep": deep, **asdict(found)}
    return document, "\n".join([head, *lines]), 1 if found.problems else 0
