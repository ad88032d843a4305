"""Measure `requant store ls` and a dry run of gc with many artifacts: `python -m infra.bench.store_list [STORE]`.

STORE is by default a bucket of a new Ceph. It is filled with ARTIFACTS artifacts of FILES files, without their blobs.
The medians of ROUNDS rounds are printed as JSON, in seconds, also for a list that reads one object at a time.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infra.bench.store_torture import bucket
from requant.tasks.artifact import File, Manifest, digest_of
from requant.tasks.store import catalog, open_store
from requant.tasks.store.gc import Policy, make_plan
from requant.tasks.store.store import Store

ARTIFACTS, FILES, ROUNDS = 1000, 20, 3


def main() -> None:
    if len(sys.argv) > 1:
        measure(open_store(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder, bucket(Path(folder) / "ceph"):
        measure(open_store("s3://requant/list"))


def measure(store: Store) -> None:
    """Fill the store, measure, and print the figures."""
    store.check()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: write(store, number), range(ARTIFACTS)))
    seconds = {
        "list": median(lambda: catalog.read_catalog(store)),
        "gc, dry": median(lambda: make_plan(store, Policy(keep_last=2))),
    }
    catalog.PARALLEL_READS = 1
    seconds["list, one read at a time"] = median(lambda: catalog.read_catalog(store))
    print(json.dumps({"store": store.url, "artifacts": ARTIFACTS, "seconds": seconds}, indent=1))


def write(store: Store, number: int) -> None:
    """Write an artifact without its blobs, which are not needed for listing."""
    files = [File(f"model-{i:05d}.safetensors", 10**9, digest_of([number, i])) for i in range(FILES)]
    key = digest_of(number)
    record = {"stage": "quantize", "seconds": 1.0, "blocks": [{"name": f"layers.{i}", "loss": 0.1} for i in range(64)]}
    store.backend.write(f"provenance/quantize/{key}", json.dumps(record).encode())
    store.backend.write(f"uses/quantize/{key}", b"")
    store.backend.write(f"artifacts/quantize/{key}", Manifest.of(files).to_json().encode())


def median(call: Callable[[], object]) -> float:
    """Return the median seconds of ROUNDS calls."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 2)


if __name__ == "__main__":
    main()
