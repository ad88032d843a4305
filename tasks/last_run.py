"""What a recipe was last run on: so that a watch starts only what there is a reason for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from tasks.hub.revision import Revision
from tasks.recipe import Recipe
from tasks.store import Store


@dataclass(frozen=True)
class LastRun:
    """The base that a recipe's last finished run read, by commit and by content, and how the run ended.

    `status` is published, validated or rejected: what failed is no finished run.
    """

    repo_id: str
    sha: str
    content: str
    status: str


def remember_run(store: Store, recipe: Recipe, base: Revision, status: str) -> None:
    """Record a finished run; a rejected one too, so that a rejected base is not run again until it changes."""
    record = LastRun(base.repo_id, base.sha, base.content, status)
    store.remember("last-runs", recipe.digest, json.dumps(asdict(record)))


def last_run(store: Store, recipe: Recipe) -> LastRun | None:
    """The record, or None if there is none that can be read."""
    text = store.recall("last-runs", recipe.digest)
    try:
        return LastRun(**{key: str(value) for key, value in json.loads(text or "").items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def first_commit(store: Store, recipe: Recipe, base: Revision) -> str:
    """The commit under which this content was first asked for: what names the runs of it.

    So an edited README, while the run of the commit before it waits or works, starts no second one.
    """
    return store.remember_first("asked", f"{recipe.digest}/{base.content}", base.sha)
