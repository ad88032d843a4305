"""The quantize child as a test sees it: its job, its process in a run, and the blocks that it has begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil

from requant.tasks.quantizing.job import Job, Rung
from requant.tasks.recipe.quantize_section import Quantize


def job_of(*, offload: bool = False, **settings: Any) -> Job:
    """Make a job with these settings of a recipe. Its model does not exist."""
    asked = Quantize(**settings)
    rung = Rung.asked(asked)
    rung = rung.model_copy(update={"offload": True}) if offload else rung
    return Job(settings=asked, rung=rung, model=Path("model"), sources=[], head=[], allow_remote_code=False)


def children(folder: Path) -> list[psutil.Process]:
    """List the living processes that quantize in a work folder somewhere below this one."""
    processes = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "requant.tasks.quantizing.child" in words and any(word.startswith(str(folder)) for word in words):
            processes.append(process)
    return processes


def block_starts(store: Path) -> list[str]:
    """List the blocks that the children of a local store have begun, in order; a block can occur twice."""
    files = list(store.glob("work/quantize-*/events.jsonl"))
    lines = files[0].read_text().splitlines() if files else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event["name"] for event in events if event["event"] == "block"]
