"""The definitions of lm-eval's tasks: what there is, what may be run here, and which data sets it reads.

Reading them runs no code of a task: lm-eval does that when it loads the task.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from requant.tasks.artifact import digest_of, sha256_of
from requant.tasks.errors import RecipeError
from requant.tasks.hub.revision import resolve
from requant.tasks.recipe.recipe import Eval

Definition = Mapping[str, Any]  # of a task, as its YAML has it


class Entry(Protocol):
    """An entry of lm-eval's index: the part that is read here."""

    @property
    def kind(self) -> Enum: ...
    @property
    def cfg(self) -> Definition | None: ...
    @property
    def tags(self) -> Collection[str]: ...


TaskIndex = Mapping[str, Entry]


def has_lm_eval() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def check_tasks(settings: Eval | None) -> None:
    """Check whether these tasks can be run here. Raises RecipeError with all sentences of `task_problems`."""
    if settings is not None and (problems := task_problems(settings)):
        raise RecipeError("; ".join(problems))


def task_problems(settings: Eval) -> list[str]:
    """Say why these tasks cannot be run here."""
    if not has_lm_eval():
        return [f"eval.tasks: {settings.tasks[0]} needs lm-eval: pip install 'requant[eval]'"]
    if settings.definitions is not None and not os.path.isdir(settings.definitions):
        return [f"eval.definitions: the folder {settings.definitions} does not exist: correct the path"]
    index, problems = _task_index(settings), []
    for name in settings.tasks:
        if name not in index:
            problems.append(f"eval.tasks: lm-eval has no task {name}: `lm_eval ls tasks` lists them")
        elif any(definition.get("unsafe_code") for definition in _leaves(index, name)):
            problems.append(
                f"eval.tasks: {name} runs code that the model writes, and this machine is no sandbox: leave it out"
            )
    return problems


def data_sets(settings: Eval) -> dict[str, str]:
    """Return the Hub data sets that the tasks name, with their current commits."""
    index = _task_index(settings)
    paths = {str(leaf.get("dataset_path")) for name in settings.tasks for leaf in _leaves(index, name)}
    return {path: resolve(path, "main", "dataset").sha for path in sorted(paths) if path.count("/") == 1}


def _leaves(index: TaskIndex, name: str, seen: frozenset[str] = frozenset()) -> Iterator[Definition]:
    """Yield the definitions of the single tasks behind a task, group or tag."""
    entry = index.get(name)
    if entry is None or name in seen:
        return
    if not _has_members(entry):
        yield entry.cfg or {}
    for member in _members(entry):
        if member is not None:
            yield from _leaves(index, member, seen | {name})


def _has_members(entry: Entry) -> bool:
    """Check whether an entry of the index is a tag, or a group with a list of its members."""
    return entry.kind.name == "TAG" or (entry.kind.name == "GROUP" and isinstance((entry.cfg or {}).get("task"), list))


def _members(entry: Entry) -> list[str | None]:
    """Name the members of a tag or a group; None for a member without a name of its own."""
    if not _has_members(entry):
        return []
    members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {})["task"]
    names = [member if isinstance(member, str) else member.get("task") or member.get("group") for member in members]
    return [name if isinstance(name, str) else None for name in names]


def definitions_digest(folder: str | None) -> str:
    """Return the digest of a folder of definitions: YAML, Python and data. Empty without a folder."""
    if folder is None:
        return ""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return digest_of([(str(path.relative_to(folder)), sha256_of(path)) for path in files])


def _task_index(settings: Eval) -> TaskIndex:
    index: TaskIndex = task_manager(settings).task_index
    return index


def task_manager(settings: Eval) -> Any:
    """Return lm-eval's TaskManager. Making one runs no code of a task: lm-eval runs it when it loads the task.

    lm-eval's own tasks are read only if those in the user's folder do not suffice. Where both have a task of the same
    name, lm-eval takes the user's in either case.
    """
    folder, digest = settings.definitions, definitions_digest(settings.definitions)
    if folder is not None:
        own = _cached_manager(folder, digest, lm_evals_own=False)
        if all(_is_complete(own.task_index, name) for name in settings.tasks):
            return own
    return _cached_manager(folder, digest, lm_evals_own=True)


def _is_complete(index: TaskIndex, name: str, above: frozenset[str] = frozenset()) -> bool:
    """Check whether an index holds a task and all of its members."""
    if name not in index or name in above:
        return False
    members = _members(index[name])
    return all(member is not None and _is_complete(index, member, above | {name}) for member in members)


@lru_cache(maxsize=2)
def _cached_manager(folder: str | None, digest: str, *, lm_evals_own: bool) -> Any:
    """Read an index. lm-eval's own tasks are 14,000 files, which takes 8 s. A changed `digest` misses the cache."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=lm_evals_own)
