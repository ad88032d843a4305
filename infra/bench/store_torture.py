"""Eight processes put, get, list and collect at random in one store, and are killed at random: `make torture`.

Runs on a directory and on a bucket (Ceph), SECONDS each. Afterwards every manifest's blobs must be whole, in every
byte, and no run that was alive may have missed anything that it relied on; then one more gc must leave nothing behind.
Prints JSON; exit status 1 if there was a problem.

Everything is quicker than in life so that it happens often: a grace period of 4 s, heartbeats of half a second. A run
pauses between its stages for longer than the grace period, as one does that quantizes for days.
"""

from __future__ import annotations

import collections
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from requant.tasks.artifact import File, Manifest, digest_of, sha256_of
from requant.tasks.errors import Collected, StoreError
from requant.tasks.pipeline.stage import Made, Stage, run_stage
from requant.tasks.store import lease as leases
from requant.tasks.store import open_store, runs
from requant.tasks.store.catalog import read_catalog
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.gc import Policy, collect, make_plan
from requant.tasks.store.runs import Run, recorded
from requant.tasks.store.store import Store
from requant.tasks.store.verify import verify_store

ROOT = Path(__file__).parent.parent.parent
SECONDS, PROCESSES, GRACE, KILLS_A_SECOND = 120.0, 8, 4.0, 0.5
STANDSTILL = 60.0  # seconds in which no process did anything, after which none will
MACHINES = 4  # local caches that the processes of a bucket share in pairs
SIZES = [0, 1, 1000, 20_000, 300_000, 2_000_000]
LARGE = 70 << 20  # one blob is sent in several parts
BLOBS = 150
Enough = Callable[[int, Sequence[dict[str, Any]]], bool]  # by the number of kills, and what the workers said they did
FORK = multiprocessing.get_context("fork")  # quick, so that many can be killed


def main() -> None:
    """Torture a directory, then a bucket."""
    logging.disable(logging.WARNING)
    seconds = float(os.environ.get("SECONDS") or SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix="torture-") as name:
            folder = Path(name)
            results = [torture((folder / "store").as_uri(), folder / "one", for_so_long(seconds))]
            with bucket(folder / "ceph"):
                results.append(torture("s3://requant/torture", folder / "two", for_so_long(seconds)))
    except TimeoutError as error:
        sys.exit(f"torture: {error}")
    print(json.dumps(results, indent=1))
    sys.exit(1 if any(result["problems"] for result in results) else 0)


class bucket:
    """A Ceph of our own, its variables in the environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = str(ROOT / "infra" / "dev" / "s3" / "ceph")

    def __enter__(self) -> None:
        subprocess.run([self.script, "up", str(self.folder)], check=True)
        for line in (self.folder / "env").read_text().splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            os.environ[name] = value

    def __exit__(self, *_: object) -> None:
        subprocess.run([self.script, "down", str(self.folder)], check=True)


def for_so_long(seconds: float) -> Enough:
    """Enough once so many seconds have passed."""
    deadline = time.monotonic() + seconds
    return lambda kills, done: time.monotonic() >= deadline


def torture(
    url: str, folder: Path, enough: Enough, seed: int = 0, kills_a_second: float = KILLS_A_SECOND
) -> dict[str, Any]:
    """Let the processes at the store at `url` until it is enough; what they did, and every problem found.

    Raises TimeoutError if all of them stand still, since what is asked for would never be enough.
    """
    folder.mkdir(parents=True)
    whole = open_store(url)
    for machine in range(MACHINES):
        opened(whole, folder, machine).check()
    getattr(whole.backend, "_client", None)  # made once, and not yet connected: each process would take a second for it
    chance = random.Random(seed)
    number, kills = 0, 0
    workers: list[multiprocessing.process.BaseProcess] = []
    started = moved = time.monotonic()
    done: list[dict[str, Any]] = []
    try:
        while not enough(kills, done):
            while len(workers) < PROCESSES:
                workers.append(FORK.Process(target=work, args=(whole, folder, number, seed), daemon=True))
                workers[-1].start()
                number += 1
            time.sleep(chance.expovariate(kills_a_second))
            victim = workers.pop(chance.randrange(len(workers)))
            kill(victim)
            kills += 1
            before, (done, _) = len(done), read_logs(folder)
            if len(done) > before:
                moved = time.monotonic()
            elif time.monotonic() >= moved + STANDSTILL:
                raise TimeoutError(f"no process has done anything in the store at {url} for {STANDSTILL:.0f} s")
        seconds = round(time.monotonic() - started, 1)
    finally:
        for worker in workers:
            kill(worker)
    done, problems = read_logs(folder)
    store = opened(open_store(url), folder, 0)
    problems += [f"afterwards: {text}" for text in verify_store(store, deep=True).problems]
    problems += clean_up(store)
    counts = collections.Counter(line["did"] for line in done)
    return {
        "store": url.partition(":")[0],
        "seconds": seconds,
        "processes": PROCESSES,
        "kills": kills + len(workers),
        "operations": sum(counts.values()),
        "did": dict(counts.most_common()),
        "artifacts_at_the_end": len(read_catalog(store).entries),
        "artifacts_collected": sum(line.get("artifacts", 0) for line in done),
        "blobs_collected": sum(line.get("blobs", 0) for line in done),
        "problems": problems,
    }


def kill(worker: multiprocessing.process.BaseProcess) -> None:
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()


def read_logs(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What the workers said they did, and their problems. The last line of a killed one may be cut."""
    lines = [line for path in sorted(folder.glob("log-*")) for line in path.read_text().splitlines()]
    done = [json.loads(line) for line in lines if line.endswith("}")]
    return done, [line["problem"] for line in done if "problem" in line]


def clean_up(store: Store) -> list[str]:
    """Collect once more, now that all are dead and everything is old: nothing may be left over, or have gone wrong."""
    later = Policy(grace=-2, unfinished=-2)
    collect(store, later)
    problems = [f"after gc: {text}" for text in verify_store(store, deep=True).problems]
    named = {file.sha256 for entry in read_catalog(store).entries.values() for file in entry.manifest.files}
    there = {key.rpartition("/")[2] for key in store.backend.keys("blobs")}
    problems += [f"after gc: blob {sha256[:12]} is left, and nothing names it" for sha256 in there - named]
    problems += [f"after gc: {key} is left" for key in store.backend.keys("leases")]
    plan = make_plan(store, later)
    problems += [f"after gc: {what} is left" for what in (*plan.records, *plan.leftovers, *plan.local_files)]
    return problems


# One process


def opened(store: Store, folder: Path, number: int) -> Store:
    """The store as one of several machines sees it."""
    return store if store.is_local else Store(store.backend, FolderBackend(folder / f"near-{number % MACHINES}"))


def work(whole: Store, folder: Path, number: int, seed: int) -> None:
    """Do things at random until killed, and write each into a log."""
    leases.BEAT_S, leases.POLL_S, leases.DEAD_AFTER_S = 0.5, 0.1, 10.0
    runs.BEAT_S, runs.POLL_S = 0.5, 0.1
    chance = random.Random(f"{seed}-{number}")
    does: list[Callable[[Store, random.Random, Path], dict[str, Any]]] = [run, run, run, get, get, get, look, gc]
    with (folder / f"log-{number}").open("w", buffering=1) as log:
        while True:
            store = opened(Store(whole.backend, whole.cache), folder, number)  # what an earlier run needed is forgotten
            what = chance.choice(does)
            try:
                outcome = what(store, chance, folder / f"scratch-{number}")
            except Collected:
                outcome = {"did": "made again"}
            except Exception as error:  # whatever it is, it is what the torture looks for
                outcome = {"did": what.__name__, "problem": f"{what.__name__}: {type(error).__name__}: {error}"}
            log.write(json.dumps(outcome) + "\n")


def content(number: int) -> bytes:
    """The bytes of the blob of this number, the same in every process."""
    size = LARGE if number == 0 else SIZES[number % len(SIZES)]
    return random.Random(number).randbytes(min(size, 1 << 20)) * max(1, size >> 20)


def run(store: Store, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """A run of three stages over one base; the last names blobs of those before, as mtp_fix does."""
    base, made = chance.randrange(12), list[Manifest]()
    names: list[tuple[str, str]] = []
    states: list[str] = []
    recipe = chance.choice("ab")

    def record() -> Run | None:
        return Run(recipe, f"demo/base@{base:040x}", recipe, tuple(names)) if names else None

    with recorded(store, record):
        for stage in ("download", "quantize", "mtp_fix"):
            key = digest_of([stage, base, "" if stage == "download" else recipe])
            result = run_stage(store, Stage(stage, 1), key, worker(store, key, list(made), chance))
            states.append(result.state)
            names.append((stage, key))
            made.append(result.manifest)
            time.sleep(chance.random() < 0.1 and GRACE * 1.5)
        for manifest in made:
            read_back(store, manifest, scratch)
    return {"did": "run: all reused" if set(states) == {"reused"} else "run"}


def worker(store: Store, key: str, before: list[Manifest], pauses: random.Random) -> Callable[[Path], Made]:
    """The work of a stage: blobs chosen by its key, written unless the store has them, and some inherited."""

    def make(folder: Path) -> Made:
        chance = random.Random(key)
        files = {f.path: f for manifest in before for f in manifest.files} if len(before) == 2 else {}
        for number in [chance.randrange(1, BLOBS) for _ in range(4)] + [0] * (chance.random() < 0.1):
            path = folder / f"file-{number}"
            path.write_bytes(content(number))
            file = File(path.name, path.stat().st_size, sha256_of(path))
            if not store.has_blob(file):
                store.put_blob(path, file)
            time.sleep(pauses.random() < 0.05 and GRACE * 1.5)  # a slow download: gc comes in between
            files[file.path] = file
        return Made(Manifest.of(files.values()), {"base": {"repo_id": "demo/base", "sha": key}})

    return make


def read_back(store: Store, manifest: Manifest, scratch: Path) -> None:
    """Check an artifact out and hash every file. Raises StoreError for what is not there or not right."""
    with store.lease("checkout", os.urandom(8).hex()):
        store.checkout(manifest, scratch)
    for file in manifest.files:
        if sha256_of(scratch / file.path) != file.sha256:
            raise StoreError(f"{file.path} has other bytes than its name says")
        (scratch / file.path).unlink()


def get(store: Store, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """Read one artifact that is listed; what is there once a lease needs it must stay."""
    entries = list(read_catalog(store).entries.values())
    if not entries:
        return {"did": "get: empty"}
    entry = chance.choice(entries)
    with store.lease("checkout", os.urandom(8).hex()):
        store.need(entry.manifest.files)
        if not all(store.sees_blob(file) for file in entry.manifest.files):
            return {"did": "get: collected before"}
        time.sleep(chance.random() < 0.15 and GRACE * 1.5)
        read_back(store, entry.manifest, scratch)
    return {"did": "get"}


def look(store: Store, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """List, and verify. What looks damaged must be going: the manifest is gone once nobody deletes."""
    catalog = read_catalog(store)
    for entry in catalog.entries.values():
        if not all(store.sees_blob(file) for file in entry.manifest.files):
            store.wait_for_gc()
            still = store.backend.read(f"artifacts/{entry.stage}/{entry.key}") is not None
            if still and store.manifest(entry.stage, entry.key) is None:
                raise StoreError(f"artifacts/{entry.stage}/{entry.key} is there without its blobs")
    return {"did": "list"}


def gc(store: Store, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """Collect by one of the rules."""
    rules: list[dict[str, Any]] = [
        {},
        {"keep_last": 1},
        {"older_than": GRACE * 1.5},
        {"max_size": 20_000_000},
        {"max_size": 0},
    ]
    plan = collect(store, Policy(**chance.choice(rules), grace=GRACE, unfinished=GRACE * 2))
    return {"did": "gc", "artifacts": len(plan.artifacts), "blobs": len(plan.blobs)}


if __name__ == "__main__":
    main()
