"""Where the time of a block goes: REQUANT_PROFILE=FOLDER makes the child write it there (and costs a few percent).

phases.jsonl       a line a block: seconds of each phase, seconds of compiling, graphs compiled so far
steps-N.txt        torch's profiler over three steps of the N-th block's tuning loop, by GPU time and by CPU time
"""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FIRST, STEPS = 12, 3  # steps of a block that are profiled


class Profile:
    """Phases by block; `step` is called after each step of a tuning loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = defaultdict(float)
        self.block, self.steps = 0, 0
        self._profiler: Any = None
        self._began = time.perf_counter()

    def step(self) -> None:
        """Count a step that a tuning loop has taken; a few of each block are profiled."""
        self.steps += 1
        if self.steps == FIRST:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.__enter__()
            _wait()
            self._began_steps = time.perf_counter()
        elif self.steps == FIRST + STEPS and self._profiler is not None:
            _wait()
            spent = time.perf_counter() - self._began_steps
            self._profiler.__exit__(None, None, None)
            averages = self._profiler.key_averages()
            tables = [averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70)]
            if torch.cuda.is_available():
                tables.insert(0, averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))
            text = f"{STEPS} steps in {spent:.3f} s, {1000 * spent / STEPS:.1f} ms a step\n" + "\n".join(tables)
            (self.folder / f"steps-{self.block + 1}.txt").write_text(text)

    def end_block(self) -> None:
        """Write the line of the block that has ended, and begin anew."""
        _wait()
        now = time.perf_counter()
        line: dict[str, Any] = {k: round(v, 3) for k, v in self.seconds.items()}
        line |= {"block": self.block + 1, "whole": round(now - self._began, 3), "steps": self.steps, **_compiled()}
        if torch.cuda.is_available():
            line["peak_allocated"] = torch.cuda.max_memory_allocated()
            line["peak_reserved"] = torch.cuda.max_memory_reserved()
        with (self.folder / "phases.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self._began, self.steps, self._profiler = now, 0, None
        self.seconds.clear()
        self.block += 1

    def timed(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Wrap a call, to add the seconds that it takes, on the GPU too, to those of a phase of the block."""

        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _wait()
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                _wait()
                self.seconds[phase] += time.perf_counter() - began

        return wrapper

    def counted(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap what takes a step of a tuning loop, to count it."""

        @functools.wraps(take_step)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = take_step(*args, **kwargs)
            self.step()
            return result

        return wrapper


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _compiled() -> dict[str, Any]:
    from torch._dynamo.utils import calculate_time_spent, counters

    spent = {k: round(v, 2) for k, v in calculate_time_spent().items()}
    return {"compile_seconds_so_far": spent, "graphs_so_far": counters["stats"].get("unique_graphs", 0)}
