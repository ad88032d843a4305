"""Run a stage: reuse its artifact, or take the lease, make the artifact and record how it was made."""

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
from requant.tasks.artifact import File, Manifest, StageKey, stage_key
from requant.tasks.errors import OutOfMemory, RequantError, WrongToolVersion, explain_os_error
from requant.tasks.record import StageRecord
from requant.tasks.store import Store
from requant.tasks.versions import installed_version, locked_version, version_problem

log = logging.getLogger(__name__)
PARALLEL_UPLOADS = 4


@dataclass(frozen=True)
class Stage:
    """The name of a stage, and the version of its code, which is raised if the same inputs give another result."""

    name: str
    version: int
    tools: tuple[str, ...] = ()  # locked packages that shape the result

    @property
    def locked(self) -> dict[str, str]:
        """The declared version of each tool."""
        return {name: locked_version(name) for name in self.tools}

    def key(self, reads: Mapping[str, str], settings: Mapping[str, Any]) -> StageKey:
        """Compute the stage key from the digests of the inputs, by name, and the settings that the stage reads."""
        return stage_key(self.name, self.version, reads=reads, settings=settings, tools=self.locked)


@dataclass(frozen=True)
class Made:
    """What a stage's work returns: the artifact, whose blobs are in the store, and what this stage alone records."""

    manifest: Manifest
    record: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class StageResult:
    """One stage of one run: its artifact, whether it `ran` or was `reused`, and the seconds that it took now."""

    name: str
    key: str
    state: str
    seconds: float
    manifest: Manifest
    provenance: StageRecord


def run_stage(
    store: Store,
    stage: Stage,
    key: str,
    work: Callable[[Path], Made],
    uses: Callable[[], Collection[str]] | None = None,
) -> StageResult:
    """Reuse the artifact of `key`, or take its lease and make it.

    `work` gets a folder that survives a crash, so the next run of the same key finds what was finished. `uses` returns
    the tools that this work runs in this environment; by default all tools of the stage. Raises WrongToolVersion if one
    of them has another version than the key says.
    """
    started_s, started = time.monotonic(), _now()
    with machine_errors():
        manifest = store.find(stage.name, key)
        state = "reused"
        if manifest is None:
            with store.lease(stage.name, key):
                manifest = store.find(stage.name, key)
                if manifest is None:
                    state = "ran"
                    _check_tools(stage, uses)
                    manifest = _make(store, stage, key, work, started, started_s)
    store.used.append((stage.name, key))
    seconds = round(time.monotonic() - started_s, 3)
    return StageResult(stage.name, key, state, seconds, manifest, store.provenance(stage.name, key))


@contextlib.contextmanager
def machine_errors() -> Iterator[None]:
    """Turn errors for lack of disk, permissions or memory into RequantError with a sentence."""
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
        if type(error).__name__ not in {"MemoryError", "OutOfMemoryError"}:  # torch has a RuntimeError of its own.
            raise
        first = next(iter(str(error).splitlines()), "no more memory")
        raise OutOfMemory(f"out of memory ({first}): use a machine or a device with more of it") from error


def _check_tools(stage: Stage, uses: Callable[[], Collection[str]] | None) -> None:
    """Raise WrongToolVersion if the artifact would be stored for all machines under versions that did not make it."""
    used = stage.tools if uses is None else uses()
    declared = {name: version for name, version in stage.locked.items() if name in used}
    if problem := version_problem(stage.name, declared):
        raise WrongToolVersion(problem, stage=stage.name)


def tool_problems(used: Iterable[tuple[Stage, Collection[str]]]) -> Iterator[str]:
    """Say which tools have a version with which `run_stage` would refuse these stages. Each tool is named once.

    `used` has the stages, each with the tools that it will use.
    """
    checked = set[str]()
    for stage, tools in used:
        declared = {name: version for name, version in stage.locked.items() if name in tools and name not in checked}
        checked |= declared.keys()
        if problem := version_problem(stage.name, declared):
            yield problem


def _make(
    store: Store, stage: Stage, key: str, work: Callable[[Path], Made], started: str, started_s: float
) -> Manifest:
    folder = store.work_folder(stage.name, key)
    inner = len(store.used)
    made = work(folder)
    record = StageRecord(made.record).with_values(
        stage=stage.name,
        started=started,
        seconds=round(time.monotonic() - started_s, 3),
        tools={name: installed_version(name) for name in stage.tools},
        machine=hardware.machine().to_json(),
        used=sorted(set(store.used[inner:])),  # Garbage collection keeps what stages inside this one made or reused.
    )
    if isinstance(key, StageKey):
        record = record.with_key_parts(key.parts)
    manifest = store.commit(stage.name, key, made.manifest, record)
    shutil.rmtree(folder, ignore_errors=True)
    return manifest


def put_files(store: Store, folder: Path, files: list[File]) -> list[File]:
    """Move finished files from a work folder into the store, several at a time."""
    store.need(files)
    with ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:
        list(pool.map(lambda file: store.put_blob(folder / file.path, file), files))
    return files


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
