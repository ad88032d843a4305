"""What is tracked, one recipe a file; which of it is due, since its base holds what it was not run on yet; one pass.

Without Prefect: a pass that finds nothing to do needs none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.flows.last_run import last_run
from requant.tasks.errors import RecipeError, RequantError
from requant.tasks.hub.rate_limit import PARALLEL_REQUESTS, Pace
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.recipe.loader import load_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store, open_store


@dataclass(frozen=True)
class Tracked:
    """A recipe, by the name of its file."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Due:
    """A tracked recipe, and the commit of its base that it is to be run on."""

    name: str
    recipe: Recipe
    base: Revision


@dataclass(frozen=True)
class Problem:
    """Why one tracked recipe could not be looked at or started. It stops no other."""

    name: str
    error: str


@dataclass(frozen=True)
class Started:
    """A run: its id on a Prefect server, where it is now `scheduled`, or how it ended here."""

    name: str
    base: Revision
    run: str | None
    status: str


Start = Callable[[Store, Sequence[Due]], Iterator[Started | Problem]]  # starts those that need it: flows/start.py


@dataclass(frozen=True)
class Pass:
    """One look at everything tracked: how many recipes, what was started, what could not be looked at or started."""

    checked: int
    started: tuple[Started, ...]
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """The document of `requant watch --once --json`."""
        started = [
            {"recipe": s.name, "repo_id": s.base.repo_id, "sha": s.base.sha, "run": s.run, "status": s.status}
            for s in self.started
        ]
        problems = [{"recipe": p.name, "error": p.error} for p in self.problems]
        return {"checked": self.checked, "started": started, "problems": problems}

    @property
    def text(self) -> str:
        """What happened, in a line, and a line for each start and problem."""
        lines = [f"{self.checked} checked, {len(self.started)} started, {len(self.problems)} problems"]
        lines += [
            f"started   {s.name}: {s.base.name}, {s.status}{f', run {s.run}' if s.run else ''}" for s in self.started
        ]
        return "\n".join([*lines, *(f"problem   {p.name}: {p.error}" for p in self.problems)])


def watch_pass(folder: Path, start: Start, repos: Collection[str] | None = None) -> Pass:
    """Look at every recipe of a folder, or only those whose base is one of `repos`, and start what is due.

    Raises RecipeError if there is no such folder, StoreError if the store cannot be used, and what `start` raises.
    """
    store = open_store()
    store.check()
    tracked, unread = load_tracked(folder, repos)
    with Pace() as pace:
        due, unseen = look(store, tracked, pace)
    outcomes = list(start(store, due)) if due else []
    started = tuple(each for each in outcomes if isinstance(each, Started))
    refused = [each for each in outcomes if isinstance(each, Problem)]
    return Pass(len(tracked) + len(unread), started, (*unread, *unseen, *refused))


def load_tracked(folder: Path, repos: Collection[str] | None = None) -> tuple[list[Tracked], list[Problem]]:
    """Read the recipes of a folder, only those whose base is one of `repos` if given; one recipe twice counts once.

    Raises RecipeError if there is no such folder.
    """
    if not folder.is_dir():
        raise RecipeError(f"the folder of recipes {folder} does not exist: name one with --recipes")
    wanted = None if repos is None else {repo.lower() for repo in repos}
    tracked: dict[str, Tracked] = {}
    problems = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            recipe = load_recipe(path)
        except RecipeError as error:
            problems.append(Problem(path.name, str(error)))
            continue
        if wanted is None or recipe.base.repo_id.lower() in wanted:
            tracked.setdefault(recipe.digest, Tracked(path.name, recipe))
    return list(tracked.values()), problems


def look(store: Store, tracked: Sequence[Tracked], pace: Pace) -> tuple[list[Due], list[Problem]]:
    """Ask the Hub for the commit of every base, one request a base, and compare with the recipes' last runs."""
    bases: dict[tuple[str, str], list[Tracked]] = defaultdict(list)
    for each in tracked:
        bases[each.recipe.base.repo_id, each.recipe.base.revision].append(each)
    pool = ThreadPoolExecutor(PARALLEL_REQUESTS)
    try:
        found = list(pool.map(lambda group: _compare(store, group, pace), bases.values()))
    finally:
        pace.stop()  # for those who wait, if interrupted
        pool.shutdown(cancel_futures=True)
    due = [each for group in found for each in group if isinstance(each, Due)]
    return due, [each for group in found for each in group if isinstance(each, Problem)]


def _compare(store: Store, group: Sequence[Tracked], pace: Pace) -> list[Due | Problem]:
    """Those of the recipes of one base that are due, or why the base cannot be looked at."""
    wanted = group[0].recipe.base
    try:
        base = pace.ask(lambda: resolve(wanted.repo_id, wanted.revision))
    except RequantError as error:
        return [Problem(each.name, str(error)) for each in group]
    found: list[Due | Problem] = []
    for each in group:
        last = last_run(store, each.recipe)
        if last is None or not last.settles(each.recipe, base):
            found.append(Due(each.name, each.recipe, base))
    return found
