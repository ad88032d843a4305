"""Let eight processes use one store at random, and kill them at random: `make torture`.

They put, get, list and collect, for SECONDS on a directory and again on a bucket (Ceph). Afterwards, all blobs of every
manifest must be there with the right content, no running process may have missed a file that it relied on, and one more
gc must leave nothing unused. Results are printed as JSON. The exit status is 1 if there was a problem.

All periods are short, so that much happens: 4 s of grace, heartbeats of half a second. A run pauses between its stages
for longer than the grace period, as a real run does that quantizes for days.
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
SECONDS, PROCESSES, GRACE_S, KILLS_A_SECOND = 120.0, 8, 4.0, 0.5
STANDSTILL_S = 60.0  # without any operation, after which the processes have stopped for good
MACHINES = 4  # each has a local cache, which two of the processes share
SIZES_BYTES = [0, 1, 1000, 20_000, 300_000, 2_000_000]
LARGE_BYTES = 70 << 20  # uploaded in several parts
BLOBS = 150
Enough = Callable[[int, Sequence[dict[str, Any]]], bool]  # from the number of kills, and the workers' logs
FORK = multiprocessing.get_context("fork")  # starts quickly, so that many processes can be killed


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
    """A new Ceph, whose variables are in the environment."""

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
    """Make a condition that is true after so many seconds."""
    deadline = time.monotonic() + seconds
    return lambda kills, done: time.monotonic() >= deadline


def torture(
    url: str, folder: Path, enough: Enough, seed: int = 0, kills_a_second: float = KILLS_A_SECOND
) -> dict[str, Any]:
    """Run and kill processes until `enough` is true. Return what they did, and every problem found.

    Raises TimeoutError if none of them does anything for STANDSTILL_S.
    """
    folder.mkdir(parents=True)
    shared = open_store(url)
    for machine in range(MACHINES):
        opened(shared, folder, machine).check()
    # The S3 client is made here, without a connection: making it takes a second, which each process would spend.
    getattr(shared.backend, "_client", None)
    chance = random.Random(seed)
    number, kills = 0, 0
    workers: list[multiprocessing.process.BaseProcess] = []
    started_s = progress_s = time.monotonic()
    done: list[dict[str, Any]] = []
    try:
        while not enough(kills, done):
            while len(workers) < PROCESSES:
                workers.append(FORK.Process(target=work, args=(shared, folder, number, seed), daemon=True))
                workers[-1].start()
                number += 1
            time.sleep(chance.expovariate(kills_a_second))
            victim = workers.pop(chance.randrange(len(workers)))
            kill(victim)
            kills += 1
            before, (done, _) = len(done), read_logs(folder)
            if len(done) > before:
                progress_s = time.monotonic()
            elif time.monotonic() >= progress_s + STANDSTILL_S:
                raise TimeoutError(f"no process has done anything in the store at {url} for {STANDSTILL_S:.0f} s")
        seconds = round(time.monotonic() - started_s, 1)
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
    """Read what the workers did, and their problems. The last line of a killed worker may be incomplete."""
    lines = [line for path in sorted(folder.glob("log-*")) for line in path.read_text().splitlines()]
    done = [json.loads(line) for line in lines if line.endswith("}")]
    return done, [line["problem"] for line in done if "problem" in line]


def clean_up(store: Store) -> list[str]:
    """Collect once more, with all processes dead and everything old; return what is damaged or left over."""
    later = Policy(grace_s=-2, unfinished_s=-2)
    collect(store, later)
    problems = [f"after gc: {text}" for text in verify_store(store, deep=True).problems]
    named = {file.sha256 for entry in read_catalog(store).entries.values() for file in entry.manifest.files}
    there = {key.rpartition("/")[2] for key in store.backend.keys("blobs")}
    problems += [f"after gc: blob {sha256[:12]} is left, and nothing names it" for sha256 in there - named]
    problems += [f"after gc: {key} is left" for key in store.backend.keys("leases")]
    plan = make_plan(store, later)
    problems += [f"after gc: {what} is left" for what in (*plan.records, *plan.leftovers, *plan.local_files)]
    return problems


# What one process does.


def opened(store: Store, folder: Path, number: int) -> Store:
    """Return the store as one of several machines sees it."""
    return store if store.is_local else Store(store.backend, FolderBackend(folder / f"cache-{number % MACHINES}"))


def work(shared: Store, folder: Path, number: int, seed: int) -> None:
    """Do random operations until this process is killed, and log each."""
    leases.BEAT_S, leases.POLL_S, leases.DEAD_AFTER_S = 0.5, 0.1, 10.0
    runs.BEAT_S, runs.POLL_S = 0.5, 0.1
    chance = random.Random(f"{seed}-{number}")
    operations: list[Callable[[Store, random.Random, Path], dict[str, Any]]] = [run, run, run, get, get, get, look, gc]
    with (folder / f"log-{number}").open("w", buffering=1) as log:
        while True:
            store = opened(Store(shared.backend, shared.cache), folder, number)  # without what an earlier run declared
            operation = chance.choice(operations)
            try:
                outcome = operation(store, chance, folder / f"scratch-{number}")
            except Collected:
                outcome = {"did": "made again"}
            except Exception as error:  # the torture looks for errors of any kind
                outcome = {
                    "did": operation.__name__,
                    "problem": f"{operation.__name__}: {type(error).__name__}: {error}",
                }
            log.write(json.dumps(outcome) + "\n")


def content(number: int) -> bytes:
    """Return the content of the blob with this number, the same in every process."""
    size = LARGE_BYTES if number == 0 else SIZES_BYTES[number % len(SIZES_BYTES)]
    return random.Random(number).randbytes(min(size, 1 << 20)) * max(1, size >> 20)


def run(store: Store, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """Run three stages on a base. The last one names blobs of those before, as mtp_fix does."""
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
            time.sleep(chance.random() < 0.1 and GRACE_S * 1.5)
        for manifest in made:
            read_back(store, manifest, scratch)
    return {"did": "run: all reused" if set(states) == {"reused"} else "run"}


def worker(store: Store, key: str, before: list[Manifest], pauses: random.Random) -> Callable[[Path], Made]:
    """Make the work of a stage: blobs that its key chooses, written unless present, and those of `before`."""

    def make(folder: Path) -> Made:
        chance = random.Random(key)
        files = {f.path: f for manifest in before for f in manifest.files} if len(before) == 2 else {}
        for number in [chance.randrange(1, BLOBS) for _ in range(4)] + [0] * (chance.random() < 0.1):
            path = folder / f"file-{number}"
            path.write_bytes(content(number))
            file = File(path.name, path.stat().st_size, sha256_of(path))
            if not store.has_blob(file):
                store.put_blob(path, file)
            time.sleep(pauses.random() < 0.05 and GRACE_S * 1.5)  # like a slow download, during which gc runs
            files[file.path] = file
        return Made(Manifest.of(files.values()), {"base": {"repo_id": "demo/base", "sha": key}})

    return make


def read_back(store: Store, manifest: Manifest, scratch: Path) -> None:
    """Check an artifact out and hash every file. Raises StoreError for a file that is missing or wrong."""
    with store.lease("checkout", os.urandom(8).hex()):
        store.checkout(manifest, scratch)
    for file in manifest.files:
        if sha256_of(scratch / file.path) != file.sha256:
            raise StoreError(f"{file.path} has other bytes than its name says")
        (scratch / file.path).unlink()


def get(store: Store, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """Read a listed artifact. Blobs that are there once a lease needs them must stay."""
    entries = list(read_catalog(store).entries.values())
    if not entries:
        return {"did": "get: empty"}
    entry = chance.choice(entries)
    with store.lease("checkout", os.urandom(8).hex()):
        store.need(entry.manifest.files)
        if not all(store.sees_blob(file) for file in entry.manifest.files):
            return {"did": "get: collected before"}
        time.sleep(chance.random() < 0.15 and GRACE_S * 1.5)
        read_back(store, entry.manifest, scratch)
    return {"did": "get"}


def look(store: Store, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """List the store. An artifact without its blobs must be one that gc is deleting: its manifest must go as well."""
    catalog = read_catalog(store)
    for entry in catalog.entries.values():
        if not all(store.sees_blob(file) for file in entry.manifest.files):
            store.wait_for_gc()
            still = store.backend.read(f"artifacts/{entry.stage}/{entry.key}") is not None
            if still and store.manifest(entry.stage, entry.key) is None:
                raise StoreError(f"artifacts/{entry.stage}/{entry.key} is there without its blobs")
    return {"did": "list"}


def gc(store: Store, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """Collect with a random policy."""
    rules: list[dict[str, Any]] = [
        {},
        {"keep_last": 1},
        {"older_than_s": GRACE_S * 1.5},
        {"max_bytes": 20_000_000},
        {"max_bytes": 0},
    ]
    plan = collect(store, Policy(**chance.choice(rules), grace_s=GRACE_S, unfinished_s=GRACE_S * 2))
    return {"did": "gc", "artifacts": len(plan.artifacts), "blobs": len(plan.blobs)}


if __name__ == "__main__":
    main()
