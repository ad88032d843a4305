"""What every stage has in common: reuse, the lease, the record beside the result, and how Prefect runs it."""

from __future__ import annotations

import contextlib
import datetime
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from requant.tasks import hardware
from requant.tasks.artifact import File, Manifest, stage_key
from requant.tasks.errors import OutOfMemory, RequantError, WrongToolVersion, explain_os_error
from requant.tasks.store import Store
from requant.tasks.versions import installed_version, locked_version, version_problem

log = logging.getLogger(__name__)
PUTS = 4


@dataclass(frozen=True)
class Stage:
    """A stage's name, and the version of its code: raise it when the same inputs give another result."""

    name: str
    version: int
    tools: tuple[str, ...] = ()  # locked packages that shape the result

    @property
    def locked(self) -> dict[str, str]:
        """The declared versions of its tools."""
        return {name: locked_version(name) for name in self.tools}

    def key(self, reads: Mapping[str, str], settings: Mapping[str, Any]) -> str:
        """The stage key for these inputs (name to digest) and this part of the recipe."""
        return stage_key(self.name, self.version, reads=reads, settings=settings, tools=self.locked)


@dataclass(frozen=True)
class Made:
    """What a stage's work returns: the artifact, whose blobs are in the store, and what to record beside it."""

    manifest: Manifest
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageResult:
    """One stage of one run: its artifact, whether it `ran` or was `reused`, and the seconds that it took now."""

    name: str
    key: str
    state: str
    seconds: float
    manifest: Manifest
    provenance: dict[str, Any]


def run_stage(
    store: Store,
    stage: Stage,
    key: str,
    work: Callable[[Path], Made],
    uses: Callable[[], Collection[str]] | None = None,
) -> StageResult:
    """Reuse the artifact of `key`, or hold its lease and make it.

    `work` gets a folder that survives a crash; the next run of the same key finds in it what was finished.
    `uses`: which of the stage's tools this work runs in this environment; None: all.
    Raises WrongToolVersion where one that is used has another version than the key says.
    """
    started, began = time.monotonic(), _now()
    with machine_errors():
        manifest = store.find(stage.name, key)
        state = "reused"
        if manifest is None:
            with store.lease(stage.name, key):
                manifest = store.find(stage.name, key)
                if manifest is None:
                    state = "ran"
                    _check_tools(stage, uses)
                    manifest = _make(store, stage, key, work, began, started)
    store.used.append((stage.name, key))
    seconds = round(time.monotonic() - started, 3)
    return StageResult(stage.name, key, state, seconds, manifest, store.provenance(stage.name, key))


@contextlib.contextmanager
def machine_errors() -> Iterator[None]:
    """Raise a sentence for what a machine runs out of inside: disk, rights, memory."""
    try:
        yield
    except RequantError:
        raise
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        raise explained from error
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ not in {"MemoryError", "OutOfMemoryError"}:  # torch's own is a RuntimeError
            raise
        first = next(iter(str(error).splitlines()), "no more memory")
        raise OutOfMemory(f"out of memory ({first}): use a machine or a device with more of it") from error


def _check_tools(stage: Stage, uses: Callable[[], Collection[str]] | None) -> None:
    """Refuse to make what would be kept, for all machines and for good, under versions that did not make it."""
    used = stage.tools if uses is None else uses()
    declared = {name: version for name, version in stage.locked.items() if name in used}
    if problem := version_problem(stage.name, declared):
        raise WrongToolVersion(problem)


def tool_problems(used: Iterable[tuple[Stage, Collection[str]]]) -> Iterator[str]:
    """Say what would end these stages here, as `run_stage` says it, from the tools that each will use.

    Each tool is named once, with the first of its stages.
    """
    told = set[str]()
    for stage, tools in used:
        declared = {name: version for name, version in stage.locked.items() if name in tools and name not in told}
        told |= declared.keys()
        if problem := version_problem(stage.name, declared):
            yield problem


def _make(store: Store, stage: Stage, key: str, work: Callable[[Path], Made], began: str, started: float) -> Manifest:
    folder = store.work_folder(stage.name, key)
    inner = len(store.used)
    made = work(folder)
    provenance = {
        **made.record,
        "stage": stage.name,
        "started": began,
        "seconds": round(time.monotonic() - started, 3),
        "tools": {name: installed_version(name) for name in stage.tools},
        "machine": hardware.machine(),
        "used": sorted(set(store.used[inner:])),  # what stages inside this one made or reused: gc keeps them with it
    }
    manifest = store.commit(stage.name, key, made.manifest, provenance)
    shutil.rmtree(folder, ignore_errors=True)
    return manifest


def put_files(store: Store, folder: Path, files: list[File]) -> list[File]:
    """Move finished files from a work folder into the store, several at once."""
    store.need(files)
    with ThreadPoolExecutor(PUTS) as pool:
        list(pool.map(lambda file: store.put_blob(folder / file.path, file), files))
    return files


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
