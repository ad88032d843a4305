"""The quantize child of a run as a test sees it: its process, and the blocks that it has begun."""

from __future__ import annotations

import json
from pathlib import Path

import psutil


def children(folder: Path) -> list[psutil.Process]:
    """The living processes that quantize in a work folder somewhere below this one."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "requant.tasks.quantizing.child" in words and any(word.startswith(str(folder)) for word in words):
            found.append(process)
    return found


def block_starts(store: Path) -> list[str]:
    """The blocks that the children of a local store have begun, in order, also twice."""
    files = list(store.glob("work/quantize-*/events.jsonl"))
    lines = files[0].read_text().splitlines() if files else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event["name"] for event in events if event["event"] == "block"]
