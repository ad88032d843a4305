"""Measure where the time of a block goes. REQUANT_PROFILE=FOLDER turns it on, which costs a few percent of the time.

It writes into FOLDER:

phases.jsonl       one line per block: the seconds of each phase and of compiling, and the graphs compiled so far
steps-N.txt        torch's profile of three steps of tuning block N, sorted by GPU time and by CPU time
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

FIRST_STEP, STEPS = 12, 3  # the steps of each block that are profiled


class Profile:
    """The seconds of each phase of a block, and a profile of some steps of its tuning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = defaultdict(float)
        self.block, self.steps = 0, 0
        self._profiler: Any = None
        self._block_started = self._steps_started = time.perf_counter()

    def step(self) -> None:
        """Count a step of a tuning loop, and profile it if it is one of STEPS from FIRST_STEP on."""
        self.steps += 1
        if self.steps == FIRST_STEP:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.__enter__()
            _wait_for_gpu()
            self._steps_started = time.perf_counter()
        elif self.steps == FIRST_STEP + STEPS and self._profiler is not None:
            _wait_for_gpu()
            spent_s = time.perf_counter() - self._steps_started
            self._profiler.__exit__(None, None, None)
            averages = self._profiler.key_averages()
            tables = [averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70)]
            if torch.cuda.is_available():
                tables.insert(0, averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))
            text = f"{STEPS} steps in {spent_s:.3f} s, {1000 * spent_s / STEPS:.1f} ms a step\n" + "\n".join(tables)
            (self.folder / f"steps-{self.block + 1}.txt").write_text(text)

    def end_block(self) -> None:
        """Write the line of the block that has ended, and start the next block."""
        from torch._dynamo.utils import calculate_time_spent, counters

        _wait_for_gpu()
        now = time.perf_counter()
        line: dict[str, object] = {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
        line |= {"block": self.block + 1, "whole": round(now - self._block_started, 3), "steps": self.steps}
        line["compile_seconds_so_far"] = {k: round(v, 2) for k, v in calculate_time_spent().items()}
        line["graphs_so_far"] = counters["stats"].get("unique_graphs", 0)
        if torch.cuda.is_available():
            line["peak_allocated"] = torch.cuda.max_memory_allocated()
            line["peak_reserved"] = torch.cuda.max_memory_reserved()
        with (self.folder / "phases.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self._block_started, self.steps, self._profiler = now, 0, None
        self.seconds.clear()
        self.block += 1

    def timed(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Wrap a call to add the seconds that it takes, on the GPU too, to a phase of the block."""

        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _wait_for_gpu()
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                _wait_for_gpu()
                self.seconds[phase] += time.perf_counter() - started

        return wrapper

    def counted(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function that takes a step of a tuning loop, to count the step."""

        @functools.wraps(take_step)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = take_step(*args, **kwargs)
            self.step()
            return result

        return wrapper


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
