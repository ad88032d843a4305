"""The last run of each recipe, from which a watch knows whether another run is due."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from requant.tasks.artifact import digest_of
from requant.tasks.hub.revision import Revision
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store


@dataclass(frozen=True)
class LastRun:
    """The base of a recipe's last finished run, by commit and by content, and how the run ended.

    `status` is published, validated or rejected; a failed run does not count as finished. `limits` is the digest of the
    limits of its gates, which is empty in records of earlier versions.
    """

    repo_id: str
    sha: str
    content: str
    status: str
    limits: str = ""

    def settles(self, recipe: Recipe, base: Revision) -> bool:
        """Check whether a recipe needs no run for this base: it had one, and was not rejected by other limits.

        Recipes with different limits have different digests, except for `max_kl_divergence: null` and its default.
        """
        if self.content != base.content:
            return False
        return self.status != "rejected" or not self.limits or self.limits == limits_digest(recipe)


def limits_digest(recipe: Recipe) -> str:
    """Return the digest of a recipe's limits."""
    return digest_of(recipe.gates.model_dump(mode="json"))


def remember_run(store: Store, recipe: Recipe, base: Revision, status: str) -> None:
    """Record a finished run. A rejected one counts, so that its base is not run again until it changes."""
    record = LastRun(base.repo_id, base.sha, base.content, status, limits_digest(recipe))
    store.put_fact("last-runs", recipe.digest, json.dumps(asdict(record)))


def last_run(store: Store, recipe: Recipe) -> LastRun | None:
    """Return the record of a recipe's last run; None if there is none, or if it is damaged."""
    text = store.get_fact("last-runs", recipe.digest)
    try:
        return LastRun(**{key: str(value) for key, value in json.loads(text or "").items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def first_commit(store: Store, recipe: Recipe, base: Revision) -> str:
    """Return the commits with which a run for this content of base and adapter was first asked for.

    They name the runs.

    So no second run is started if the README is edited while the run of an earlier commit waits or works.
    """
    return store.put_first_fact("asked", f"{recipe.digest}/{base.content}", base.commits)
