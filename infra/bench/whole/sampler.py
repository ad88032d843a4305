"""Notes what a process tree and the GPU take, every second: one line of JSON per sample."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from requant.tasks import hardware
from requant.tasks.background import repeated

PAUSE_S = 1.0


@dataclass(frozen=True)
class Sample:
    """One moment, in seconds since the epoch. All sizes are in bytes.

    private_bytes  memory of the process tree that belongs to no file
    mapped_bytes   pages of mapped files in memory, such as those of the base
    gpu_bytes      memory in use on all GPUs; None without a GPU
    gpu_percent    how much of the time the busiest GPU worked; None without a GPU
    cpu_seconds    processor time of the process tree since its start, as far as its processes live
    disk_bytes     the store on the disk, each file once
    """

    at: float
    private_bytes: int
    mapped_bytes: int
    gpu_bytes: int | None
    gpu_percent: int | None
    cpu_seconds: float
    disk_bytes: int


@contextmanager
def sampling(pid: int, store: Path, path: Path) -> Iterator[None]:
    """Append samples of a process tree and a store to a file until the block ends."""
    with path.open("a", buffering=1) as stream:

        def note() -> None:
            stream.write(json.dumps(asdict(take_sample(pid, store))) + "\n")

        with repeated(note, PAUSE_S, "no sample", at_end=False):
            yield


def take_sample(pid: int, store: Path) -> Sample:
    """Measure once. Processes that end meanwhile count as nothing."""
    private = mapped = 0
    cpu_seconds = 0.0
    for process in _tree(pid):
        try:
            memory, times = process.memory_info(), process.cpu_times()
        except psutil.Error:
            continue
        shared = getattr(memory, "shared", 0)
        private += memory.rss - shared
        mapped += shared
        cpu_seconds += times.user + times.system
    rows = hardware.query("gpu=utilization.gpu")
    busy = [int(row[0]) for row in rows if row[0].isdecimal()]
    used = hardware.used_bytes()
    return Sample(
        time.time(), private, mapped, used, max(busy, default=None), round(cpu_seconds, 1), bytes_below(store)
    )


def read_samples(path: Path) -> list[Sample]:
    """Read the samples of a file. A last line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Sample(**json.loads(line)) for line in lines if line.endswith("\n")]


def bytes_below(folder: Path) -> int:
    """Return the bytes on the disk of all files below a folder. A file with several names counts once."""
    sizes: dict[int, int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(root, name))
            except OSError:  # It was removed meanwhile.
                continue
            sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []
