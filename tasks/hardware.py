"""Describe this machine, and ask nvidia-smi for its GPUs and the memory that processes use on them."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

MIB = 1 << 20


def query(fields: str) -> list[list[str]]:
    """Return the rows of an nvidia-smi query such as `gpu=name`. There are none without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        command = [program, f"--query-{fields}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return [[cell.strip() for cell in row.split(",")] for row in rows]


def gpu_names() -> list[str]:
    """Return the names of this machine's GPUs."""
    return [row[0] for row in query("gpu=name")]


def used_bytes() -> int | None:
    """Return the memory in use on all GPUs together; None without a GPU."""
    used_mib = [int(row[0]) for row in query("gpu=memory.used") if row[0].isdecimal()]
    return sum(used_mib) * MIB if used_mib else None


def held_bytes(pids: Collection[int], before: int | None) -> int | None:
    """Return the memory that these processes use on all GPUs.

    nvidia-smi does not know the process ids of a container. There it is the memory that is in use beyond `before`.
    """
    rows = [row for row in query("compute-apps=pid,used_memory") if len(row) == 2]
    held = sum(int(size) for pid, size in rows if pid.isdecimal() and size.isdecimal() and int(pid) in pids) * MIB
    if held:
        return held
    now = used_bytes()
    return None if now is None or before is None else max(0, now - before)


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    memory_bytes: int


def visible_gpus() -> tuple[Gpu, ...] | None:
    """List the GPUs that this process may use; None if there may be some that nvidia-smi does not list.

    An index in CUDA_VISIBLE_DEVICES that there is no GPU of ends the list, as in CUDA. Identifiers other than indices
    are not looked up: then all GPUs are listed.
    """
    rows = [row for row in query("gpu=name,memory.total") if len(row) == 2 and row[1].isdecimal()]
    gpus = [Gpu(name, int(size_mib) * MIB) for name, size_mib in rows]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and re.fullmatch(r"[-\d, ]*", chosen):
        indices = [int(index) for index in re.findall(r"-?\d+", chosen)]
        if indices[:1] >= [0] and not gpus and (os.path.exists("/dev/kfd") or gpu_names()):
            return None
        return tuple(gpus[i] for i in itertools.takewhile(lambda i: 0 <= i < len(gpus), indices))
    # AMD's driver has the device kfd. A machine whose nvidia-smi lists no memory has GPUs all the same.
    return tuple(gpus) if gpus or not (os.path.exists("/dev/kfd") or gpu_names()) else None


def total_memory_bytes() -> int:
    """Return the memory that the processes of this machine or container may use together."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [whole]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # A cgroup without a limit says `max`.
            limits.append(int(Path(path).read_text()))
    return min(limits)


@dataclass(frozen=True)
class Machine:
    """A machine, as the record of a stage describes it. What a record does not say is None."""

    system: str | None
    python: str | None
    cpus: int | None
    memory_bytes: int | None
    gpus: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gpus": list(self.gpus)}

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> Machine:
        """Read a description. A value of another type counts as one that is not there."""
        texts = (document.get("system"), document.get("python"))
        system, python = (text if isinstance(text, str) else None for text in texts)
        counts = (document.get("cpus"), document.get("memory_bytes"))
        cpus, memory_bytes = (count if isinstance(count, int) else None for count in counts)
        gpus = document.get("gpus")
        return cls(system, python, cpus, memory_bytes, tuple(map(str, gpus)) if isinstance(gpus, list) else ())


@cache
def machine() -> Machine:
    """Describe this machine."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpus=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        gpus=tuple(gpu_names()),
    )
