"""Compare the speed of the store with awscli, s3fs and boto3 on the same Ceph: `make bench-store`.

SIZE MB (4096) of random data in FILES files (8) are moved in REPEATS rounds (5), in which the order of the four clients
changes. Each operation is a process of its own, measured from start to end. Requant checks the sha256 of what it moves
and waits until fetched files are on the disk; the other clients do neither. Fetching what is present already takes them
as long as the first time, so they do it in the first round only. No round begins that would not end within MINUTES
(18).

Afterwards the same files are moved in a local store and with `cp -r`, and a present artifact of 18 GB is looked up. The
figures are printed as JSON and written to build/bench-store.json: all times in seconds, CPU seconds and peak memory of
each client (at least that of this process, which Linux counts in), and ratios, the median of the best other client
divided by ours. The virtual environments of the other clients stay in build/bench-peers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from infra.bench.store_contenders import PEERS, ours, peer
from requant.tasks.artifact import File, Manifest, file_of
from requant.tasks.record import StageRecord
from requant.tasks.store import Store, open_store
from requant.tasks.store.store import blob_key

ROOT = Path(__file__).parent.parent.parent
CEPH = str(ROOT / "infra" / "dev" / "s3" / "ceph")
PINNED = {"aws": "awscli==1.46.3", "boto3": "boto3==1.44.8", "s3fs": "s3fs==2026.9.0"}
SIZE_BYTES = int(os.environ.get("SIZE") or 4096) << 20
REPEATS = int(os.environ.get("REPEATS") or 5)
MINUTES = float(os.environ.get("MINUTES") or 18)
FILES = int(os.environ.get("FILES") or 8)
ARTIFACT_BYTES = 18 * 10**9
Times = dict[str, dict[str, list[dict[str, float]]]]  # by operation, by contender, by round


def main() -> None:
    """Run the benchmark, and print and write its figures."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs the clean-up below
    venvs = {name: _venv(name) for name in PEERS}
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="bench-store-") as name:
        scratch = Path(name)
        manifest = _make_files(scratch)
        subprocess.run([CEPH, "up", str(scratch / "ceph")], check=True, capture_output=True, timeout=120)
        try:
            _take_variables(scratch / "ceph" / "env")
            times = _rounds(scratch, venvs, began + MINUTES * 60)
            reuse = {"s3": _reuse(scratch, "s3://requant/reuse", sparse=False)}
        finally:
            subprocess.run([CEPH, "down", str(scratch / "ceph")], check=True, capture_output=True, timeout=60)
        reuse["local"] = _reuse(scratch, (scratch / "reuse").as_uri(), sparse=True)
        local = _local(scratch, manifest)
    document = {
        "size": SIZE_BYTES,
        "files": FILES,
        "rounds": len(times["put"]["requant"]),
        "ratios": {operation: _ratio(times[operation], PEERS) for operation in times},
        "medians": {operation: _medians(times[operation]) for operation in times},
        "peak_rss_mb": {who: max(t["rss_mb"] for o in times.values() for t in o[who]) for who in ("requant", *PEERS)},
        "local": {
            "ratios": {o: _ratio(local[o], ("cp",)) for o in local},
            "medians": {o: _medians(local[o]) for o in local},
        },
        "reuse_of_18_gb": reuse,
        "times": times,
        "local_times": local,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    text = json.dumps(document, indent=1)
    (ROOT / "build" / "bench-store.json").write_text(text)
    sys.stdout.write(text + "\n")


def _rounds(scratch: Path, venvs: dict[str, Path], until: float) -> Times:
    """Run the rounds that end before `until`, by `time.monotonic`."""
    times: Times = defaultdict(lambda: defaultdict(list))
    order = ["requant", *PEERS]
    longest = 0.0
    for number in range(REPEATS):
        if time.monotonic() + longest > until:
            break
        started = time.monotonic()
        for who in order:
            _one(scratch, venvs, who, number, times)
        order.append(order.pop(0))
        again = 0.0 if number else sum(times["get_present"][who][0]["seconds"] for who in PEERS)
        longest = max(longest, time.monotonic() - started - again)
        _say(f"round {number + 1} of {REPEATS}: {time.monotonic() - started:.0f} s")
    return times


def _one(scratch: Path, venvs: dict[str, Path], who: str, number: int, times: Times) -> None:
    """Measure a client: put, get, and get again what is present. Afterwards its files are deleted everywhere."""
    prefix, url = f"{who}-{number}", f"s3://requant/{who}-{number}"
    put, got = scratch / "put", scratch / "got"
    shutil.copytree(scratch / "files", put, copy_function=os.link)

    def do(operation: str, verb: str, folder: Path) -> None:
        own = ours(verb, folder, url, scratch / "manifest.json")
        command = own if who == "requant" else peer(who, venvs[who], verb, folder, "requant", prefix)
        times[operation][who].append(_timed(command, scratch))

    do("put", "put", put)
    shutil.rmtree(scratch / "cache", ignore_errors=True)  # the local cache
    do("get", "get", got)
    if who == "requant":
        do("get_present", "get", got)
        manifest = Manifest.from_json((scratch / "manifest.json").read_text())
        if any(file_of(got, file.path) != file for file in manifest.files):
            raise SystemExit("what came back is not what was put")
    elif number == 0:
        do("get_present", "get", got)
    for folder in (put, got, scratch / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    backend = open_store(url).backend
    for key in (
        list(backend.keys("blobs")) if who == "requant" else [path.name for path in (scratch / "files").iterdir()]
    ):
        backend.delete(key)
    collect = ["radosgw-admin", "-c", "ceph.conf", "gc", "process", "--include-all"]
    subprocess.run(collect, cwd=scratch / "ceph", check=True, capture_output=True, timeout=120)


def _local(scratch: Path, manifest: Manifest) -> Times:
    """Measure a local store and `cp -r`: put (renames), get (hard links), and copy."""
    times: Times = defaultdict(lambda: defaultdict(list))
    for number in range(REPEATS):
        store, folder = scratch / f"local-{number}", scratch / f"put-{number}"
        shutil.copytree(scratch / "files", folder, copy_function=os.link)
        for operation, verb, where in (
            ("put", "put", folder),
            ("get", "get", scratch / "got"),
            ("copy", "copy", scratch / "copy"),
        ):
            own = ours(verb, where, store.as_uri(), scratch / "manifest.json")
            copy = ["cp", "-r", str(scratch / "files"), str(scratch / "cp")]
            for who, command in (("requant", own), ("cp", copy))[:: -1 if number % 2 else 1]:
                times[operation][who].append(_timed(command, scratch))
                shutil.rmtree(scratch / "cp", ignore_errors=True)
            shutil.rmtree(where)
        shutil.rmtree(store)
    return times


def _reuse(scratch: Path, url: str, *, sparse: bool) -> dict[str, float]:
    """Measure how long it takes to find a present artifact of 18 GB, with the start of Python. Only sizes are read.

    A local artifact has 8 sparse files. In S3 it has 200 small objects, since their number determines the time.
    """
    store = open_store(url)
    count = 8 if sparse else 200
    size = ARTIFACT_BYTES // count if sparse else 1
    manifest = Manifest.of(File(f"{i}", size, f"{i:064x}") for i in range(count))
    _fill(store, manifest, sparse)
    store.commit("bench", "0" * 64, manifest, StageRecord())
    path = scratch / "reuse.json"
    path.write_text(manifest.to_json())
    return _timed(ours("reuse", scratch, url, path), scratch)


def _fill(store: Store, manifest: Manifest, sparse: bool) -> None:
    """Write the blobs of an artifact: sparse files, or objects of one byte."""
    from concurrent.futures import ThreadPoolExecutor

    def fill(file: File) -> None:
        if not sparse:
            store.backend.write(blob_key(file.sha256), b"0")
            return
        path = store.cache.path(blob_key(file.sha256))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.truncate(file.size)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, manifest.files))


def _timed(command: list[str], scratch: Path) -> dict[str, float]:
    """Run a command that must succeed, after a sync of the disk; return its seconds, CPU seconds and peak memory."""
    os.sync()
    environment = {**os.environ, "XDG_CACHE_HOME": str(scratch / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # KeyboardInterrupt or SystemExit
            process.kill()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{command[:4]} failed: {output.read()[-2000:].decode(errors='replace')}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": round(seconds, 3), "cpu": round(cpu, 3), "rss_mb": round(usage.ru_maxrss / 1024, 1)}


def _medians(operation: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    return {who: statistics.median(t["seconds"] for t in rounds) for who, rounds in operation.items()}


def _ratio(operation: dict[str, list[dict[str, float]]], peers: tuple[str, ...]) -> float:
    medians = _medians(operation)
    return round(min(medians[who] for who in peers) / medians["requant"], 3)


def _make_files(scratch: Path) -> Manifest:
    folder = scratch / "files"
    folder.mkdir()
    for number in range(FILES):
        with (folder / f"model-{number:05d}.safetensors").open("wb") as stream:
            for start in range(0, SIZE_BYTES // FILES, 16 << 20):
                stream.write(os.urandom(min(16 << 20, SIZE_BYTES // FILES - start)))
    manifest = Manifest.of(file_of(folder, path.name) for path in folder.iterdir())
    (scratch / "manifest.json").write_text(manifest.to_json())
    return manifest


def _take_variables(env: Path) -> None:
    for line in env.read_text().splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        os.environ[name] = value.strip("'\"")


def _venv(name: str) -> Path:
    """Make a virtual environment for a client: s3fs needs another botocore than the others."""
    folder = ROOT / "build" / "bench-peers" / name
    if not (folder / "ready").exists():
        _say(f"installing {PINNED[name]}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", PINNED[name]], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return folder


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
