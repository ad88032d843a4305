"""What a recipe was last run on: so that a watch starts only what there is a reason for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from requant.tasks.artifact import digest_of
from requant.tasks.hub.revision import Revision
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store


@dataclass(frozen=True)
class LastRun:
    """The base that a recipe's last finished run read, by commit and by content, and how the run ended.

    `status` is published, validated or rejected: what failed is no finished run. `limits`: a digest of the gates'
    limits that it was compared with, empty in records of earlier versions.
    """

    repo_id: str
    sha: str
    content: str
    status: str
    limits: str = ""

    def settles(self, recipe: Recipe, base: Revision) -> bool:
        """Whether a recipe needs no run for this content of its base: it had one, and was not rejected by other limits.

        Recipes that differ in a limit have different digests, but for `max_kl_divergence: null` and its default.
        """
        if self.content != base.content:
            return False
        return self.status != "rejected" or not self.limits or self.limits == limits_of(recipe)


def limits_of(recipe: Recipe) -> str:
    """The digest of a recipe's limits."""
    return digest_of(recipe.gates.model_dump(mode="json"))


def remember_run(store: Store, recipe: Recipe, base: Revision, status: str) -> None:
    """Record a finished run; a rejected one too, so that a rejected base is not run again until it changes."""
    record = LastRun(base.repo_id, base.sha, base.content, status, limits_of(recipe))
    store.put_fact("last-runs", recipe.digest, json.dumps(asdict(record)))


def last_run(store: Store, recipe: Recipe) -> LastRun | None:
    """The record, or None if there is none that can be read."""
    text = store.get_fact("last-runs", recipe.digest)
    try:
        return LastRun(**{key: str(value) for key, value in json.loads(text or "").items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def first_commit(store: Store, recipe: Recipe, base: Revision) -> str:
    """The commit under which this content was first asked for: what names the runs of it.

    So an edited README, while the run of the commit before it waits or works, starts no second one.
    """
    return store.put_first_fact("asked", f"{recipe.digest}/{base.content}", base.sha)
