"""One pass of the watch: read the recipes, ask the Hub for their bases, and start the runs that are due.

This module does not import Prefect, which a pass needs only if it starts a run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field

from requant.flows.last_run import last_run
from requant.flows.recipes import recipe_files
from requant.tasks.documents import Document
from requant.tasks.errors import RecipeError, RequantError
from requant.tasks.hub.rate_limit import PARALLEL_REQUESTS, Pace
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.local_base import find_local_base
from requant.tasks.merge import adapter_files, find_adapter
from requant.tasks.recipe.base_section import Base
from requant.tasks.recipe.loader import load_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store, open_checked_store


@dataclass(frozen=True)
class Tracked:
    """A recipe, and the name of its file."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Due:
    """A tracked recipe with the commit of its base for which a run is due."""

    name: str
    recipe: Recipe
    base: Revision


@dataclass(frozen=True)
class Problem:
    """Why one tracked recipe could not be read, compared or started."""

    name: str
    error: str


@dataclass(frozen=True)
class Started:
    """A run that was started. `status` is `scheduled` on a Prefect server, otherwise how the run ended here."""

    name: str
    base: Revision
    run: str | None
    status: str


Start = Callable[[Store, Sequence[Due]], Iterator[Started | Problem]]  # flows/start.py has two of them


class StartedRun(Document):
    """A run that a pass started."""

    recipe: str = Field(description="File name of the recipe")
    repo_id: str = Field(description="The base's repo")
    sha: str = Field(description="The base's new commit")
    run: str | None = Field(description="Id of the run on the Prefect server; null if it ran here")
    status: str = Field(description="scheduled on a Prefect server, otherwise how the run ended")


class WatchProblem(Document):
    """A recipe whose base could not be compared, or whose run could not be started."""

    recipe: str = Field(description="File name of the recipe")
    error: str = Field(description="What went wrong, in one sentence")


class WatchDocument(Document):
    """The document of `requant watch --once`."""

    checked: int = Field(description="How many recipes there are")
    started: list[StartedRun] = Field(description="The runs that were started")
    problems: list[WatchProblem] = Field(description="What went wrong")


@dataclass(frozen=True)
class Pass:
    """The result of a pass: how many recipes there are, which runs were started, and what went wrong."""

    checked: int
    started: tuple[Started, ...]
    problems: tuple[Problem, ...]

    def document(self) -> WatchDocument:
        """Return the document of `requant watch --once`."""
        return WatchDocument(
            checked=self.checked,
            started=[
                StartedRun(recipe=s.name, repo_id=s.base.repo_id, sha=s.base.sha, run=s.run, status=s.status)
                for s in self.started
            ],
            problems=[WatchProblem(recipe=p.name, error=p.error) for p in self.problems],
        )

    @property
    def text(self) -> str:
        """A summary in one line, then a line for each started run and each problem."""
        lines = [f"{self.checked} checked, {len(self.started)} started, {len(self.problems)} problems"]
        lines += [
            f"started   {s.name}: {s.base.name}, {s.status}{f', run {s.run}' if s.run else ''}" for s in self.started
        ]
        return "\n".join([*lines, *(f"problem   {p.name}: {p.error}" for p in self.problems)])


def watch_pass(folder: Path, start: Start, repos: Collection[str] | None = None) -> Pass:
    """Compare every recipe of a folder, or only those whose base is in `repos`, and start the runs that are due.

    Raises RecipeError if there is no such folder, StoreError if the store cannot be used, and what `start` raises.
    """
    store = open_checked_store()
    tracked, unread = load_tracked(folder, repos)
    with Pace() as pace:
        due, not_compared = find_due(store, tracked, pace)
    outcomes = list(start(store, due)) if due else []
    started = tuple(outcome for outcome in outcomes if isinstance(outcome, Started))
    not_started = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    return Pass(len(tracked) + len(unread), started, (*unread, *not_compared, *not_started))


def load_tracked(folder: Path, repos: Collection[str] | None = None) -> tuple[list[Tracked], list[Problem]]:
    """Read the recipes of a folder. If `repos` is given, return only recipes whose base or adapter is one of these.

    Of several files with the same recipe, the first one counts. Raises what `recipe_files` raises.
    """
    wanted = None if repos is None else {repo.lower() for repo in repos}
    tracked: dict[str, Tracked] = {}
    problems = []
    for path in recipe_files(folder):
        try:
            recipe = load_recipe(path)
        except RecipeError as error:
            problems.append(Problem(path.name, str(error)))
            continue
        if wanted is None or wanted & {one.name.lower() for one in _sources(recipe) if one.folder is None}:
            tracked.setdefault(recipe.digest, Tracked(path.name, recipe))
    return list(tracked.values()), problems


def find_due(store: Store, tracked: Sequence[Tracked], pace: Pace) -> tuple[list[Due], list[Problem]]:
    """Ask the Hub for the commit of each base and adapter, and compare them with the recipes' last runs.

    Recipes of the same base and adapter share a request for each. Folders are read where they changed.
    """
    bases: dict[tuple[Base, ...], list[Tracked]] = defaultdict(list)
    for one in tracked:
        bases[_sources(one.recipe)].append(one)
    pool = ThreadPoolExecutor(PARALLEL_REQUESTS)
    try:
        on_hub = [group for key, group in bases.items() if key[0].folder is None]
        asked = pool.map(lambda group: _compare(store, group, pace), on_hub)
        # Folders are hashed in this thread, where Ctrl-C ends it.
        read = [_compare(store, group, pace) for key, group in bases.items() if key[0].folder is not None]
        groups = [*asked, *read]
    finally:
        pace.stop()  # If the pass was interrupted, no thread goes on waiting.
        pool.shutdown(cancel_futures=True)
    outcomes = [outcome for group in groups for outcome in group]
    due = [outcome for outcome in outcomes if isinstance(outcome, Due)]
    return due, [outcome for outcome in outcomes if isinstance(outcome, Problem)]


def _compare(store: Store, group: Sequence[Tracked], pace: Pace) -> list[Due | Problem]:
    """Return the recipes of one base that are due, or a problem for each if the base cannot be had."""
    recipe = group[0].recipe
    try:
        base = find_local_base(store, recipe.base) if recipe.base.folder is not None else _ask(recipe.base, pace)
        if recipe.adapter is not None:
            local = recipe.adapter.folder is not None
            adapter = find_adapter(store, recipe.adapter) if local else adapter_files(_ask(recipe.adapter, pace))
            base = replace(base, adapter=adapter)
    except RequantError as error:
        return [Problem(one.name, str(error)) for one in group]
    due: list[Due | Problem] = []
    for one in group:
        last = last_run(store, one.recipe)
        if last is None or not last.settles(one.recipe, base):
            due.append(Due(one.name, one.recipe, base))
    return due


def _ask(source: Base, pace: Pace) -> Revision:
    return pace.ask(lambda: resolve(source.name, source.revision))


def _sources(recipe: Recipe) -> tuple[Base, ...]:
    """Return what is watched for a recipe: its base, and its adapter if it has one."""
    return (recipe.base,) if recipe.adapter is None else (recipe.base, recipe.adapter)
