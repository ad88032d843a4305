"""This machine, and its GPUs as nvidia-smi knows them: their names, and the memory that processes hold there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Collection
from functools import cache
from typing import Any

MIB = 1 << 20


def query(what: str) -> list[list[str]]:
    """The rows of an nvidia-smi query, as in `gpu=name`; none where there is no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        command = [program, f"--query-{what}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return [[cell.strip() for cell in row.split(",")] for row in rows]


def names() -> list[str]:
    """The names of this machine's GPUs."""
    return [row[0] for row in query("gpu=name")]


def used_bytes() -> int | None:
    """Memory that is taken on all GPUs together; None where there is none."""
    found = [int(row[0]) for row in query("gpu=memory.used") if row[0].isdecimal()]
    return sum(found) * MIB if found else None


def held_bytes(pids: Collection[int], before: int | None) -> int | None:
    """What these processes hold on all GPUs; in a container, whose processes nvidia-smi does not know by these numbers,
    what has been taken since `before`.
    """
    rows = [row for row in query("compute-apps=pid,used_memory") if len(row) == 2]
    held = sum(int(size) for pid, size in rows if pid.isdecimal() and size.isdecimal() and int(pid) in pids) * MIB
    if held:
        return held
    now = used_bytes()
    return None if now is None or before is None else max(0, now - before)


@cache
def machine() -> dict[str, Any]:
    """Describe this machine, for the record of a stage."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_bytes": pages,
        "gpus": names(),
    }
