"""Run the quantize child, and restart it with lower memory use after each out-of-memory failure.

The settings form a ladder. Its first rung is what the recipe asks for; then come the samples in the CPU's memory
(low_gpu_mem), smaller and smaller batches, and finally the activations in the CPU's memory too (offload).

`ladder.json` in the work folder holds the current rung and all attempts. It survives a crash, so that the next run does
not repeat settings that have failed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from requant.tasks.environment import with_package
from requant.tasks.errors import SECRET_VARIABLES, OutOfMemory, QuantizeDied, QuantizeFailed, StageTimeout
from requant.tasks.quantizing.events import BlockStarted, Event, EventSink, Failed, SettingsChosen, read_events
from requant.tasks.quantizing.failures import OUT_OF_MEMORY, FailureKind
from requant.tasks.quantizing.job import Job, JobResult, Rung

log = logging.getLogger(__name__)

# The time limit of the stage, for all children together.
TIMEOUT_S = 47.5 * 3600
POLL_INTERVAL_S = 0.3
# Treat this many consecutive deaths in one block as out of memory if the last was a SIGKILL. Each earlier death raises
# QuantizeDied, and the retry resumes the count from ladder.json.
MAX_DEATHS = 3


def ladder(asked: Rung) -> Iterator[Rung]:
    """Yield the settings that were asked for, then settings that need less and less memory.

    All of them give the same result, except for rounding noise.
    """
    rung = asked
    yield rung
    if rung.low_gpu_mem is not True:  # It can also be "auto".
        rung = rung.model_copy(update={"low_gpu_mem": True})
        yield rung
    total = asked.batch_size
    for batch_size in (size for size in range(total // 2, 0, -1) if total % size == 0):
        smaller = {"batch_size": batch_size, "gradient_accumulate_steps": total // batch_size}
        rung = rung.model_copy(update=smaller)
        yield rung
    yield rung.model_copy(update={"offload": True})


class Attempt(Rung):
    """A rung that was tried, how that ended, and in which block unless it succeeded.

    `ended` is `done`, `died`, or the value of a FailureKind.
    """

    ended: str
    block: str | None = None


class Progress:
    """The content of `ladder.json`: the current rung, all attempts, and how often the child died in the last block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rung_index, self.compile_allowed = 0, True
        self.attempts: list[Attempt] = []
        self.deaths = 0  # in a row in `deaths_block`
        self.deaths_block: str | None = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(path.read_text())
            self.attempts = [Attempt.model_validate(attempt) for attempt in saved["attempts"]]
            self.rung_index, self.compile_allowed = int(saved["rung"]), bool(saved["compiled"])
            for block, deaths in dict(saved["deaths"]).items():  # at most one
                self.deaths, self.deaths_block = int(deaths), None if block == "None" else block

    def save(self) -> None:
        """Replace the file."""
        document = {
            "rung": self.rung_index,
            "compiled": self.compile_allowed,
            "attempts": [attempt.model_dump(exclude_unset=True) for attempt in self.attempts],
            "deaths": {str(self.deaths_block): self.deaths} if self.deaths else {},
        }
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(document))
        os.replace(temporary, self._path)

    def add(self, rung: Rung, ended: str, block: str | None = None) -> None:
        """Add an attempt, and save it."""
        where = {"block": block} if block else {}
        self.attempts.append(Attempt(**rung.model_dump(exclude_unset=True), ended=ended, **where))
        self.save()

    def count_death(self, block: str | None) -> int:
        """Return how many times in a row the child has died in this block, this time included."""
        self.deaths = self.deaths + 1 if block == self.deaths_block else 1
        self.deaths_block = block
        return self.deaths

    def next_settings(self, rungs: Sequence[Rung]) -> Rung:
        """Return the settings of the current rung, adapted to how earlier attempts failed."""
        rung = rungs[self.rung_index]
        if not self.compile_allowed:
            rung = rung.model_copy(update={"torch_compile": False})
        memory_failures = [attempt for attempt in self.attempts if attempt.ended in OUT_OF_MEMORY]
        if memory_failures and memory_failures[-1].ended == FailureKind.HOST_MEMORY:
            # low_gpu_mem would move the samples into the memory that ran out.
            rung = rung.model_copy(update={"low_gpu_mem": memory_failures[-1].low_gpu_mem})
        return rung


def quantize_with_fallback(
    job: Job, folder: Path, report: EventSink, deadline_s: float = math.inf
) -> tuple[JobResult, list[Attempt]]:
    """Run the child with one rung after another until it succeeds; `report` gets its events as they come.

    Returns its result and all attempts, those of earlier runs in this folder included. Raises QuantizeFailed,
    OutOfMemory if the last rung ran out of memory, QuantizeDied if the child ended without reporting an error, and
    StageTimeout if `time.monotonic()` passes `deadline_s`.
    """
    progress = Progress(folder / "ladder.json")
    events, log_file, result_path = folder / "events.jsonl", folder / "log.txt", folder / "result.json"
    rungs = list(ladder(job.rung))
    # After the last rung failed, its index stays in the file, and the next run tries it again. A larger index can only
    # come from a file that something else wrote.
    progress.rung_index = min(progress.rung_index, len(rungs) - 1)
    while not result_path.exists():
        rung = progress.next_settings(rungs)
        kernel_kills_before = kernel_kills()
        try:
            failed = run_child(job.model_copy(update={"rung": rung}), folder, report, deadline_s)
        except QuantizeDied as died:
            block = last_block(events)
            deaths = progress.count_death(block)
            out_of_memory = deaths >= MAX_DEATHS or kernel_kills() > kernel_kills_before
            if not (died.killed and out_of_memory):
                progress.add(rung, "died", block)
                raise
            kind, text = FailureKind.HOST_MEMORY, str(died)
        else:
            if failed is None:
                progress.add(rung, "done")
                break
            block = last_block(events)
            kind, text = failed.kind, failed.text
        progress.add(rung, kind.value, block)
        if kind is FailureKind.COMPILE and progress.compile_allowed:
            log.info("torch.compile failed: going on without it")
            progress.compile_allowed = False
        elif kind in OUT_OF_MEMORY:
            where = block or "the calibration"
            host = kind is FailureKind.HOST_MEMORY
            low_gpu_mem = last_settings(events).low_gpu_mem is True
            following = _next_rung(rungs, progress.rung_index, low_gpu_mem=low_gpu_mem, host=host)
            progress.deaths = 0
            if following is None:
                raise OutOfMemory(
                    f"{'the machine' if host else 'the GPU'} is out of memory even with one sample at a time"
                    f"{', with offload' if rung.offload else ''}, in {where} ({log_file}): use a "
                    f"{'machine' if host else 'GPU'} with more memory"
                )
            progress.rung_index = following
            log.info(f"out of memory in {where}: resuming with {_changes(rung, progress.next_settings(rungs))}")
        elif kind is FailureKind.REFUSED:
            raise QuantizeFailed(text)
        else:
            raise QuantizeFailed(f"auto-round failed: {text} (its log: {log_file})")
        progress.save()
    return JobResult.model_validate_json(result_path.read_text()), progress.attempts


def _next_rung(rungs: Sequence[Rung], index: int, *, low_gpu_mem: bool, host: bool) -> int | None:
    """Return the index of the next rung that needs less of the memory that ran out; None if there is none.

    `low_gpu_mem`: the rung that failed used it already. `host`: host memory ran out, not GPU memory.
    """

    def needs_less(rung: Rung) -> bool:
        """Check whether a later rung needs less. Only a smaller batch helps the host; the rest moves data to it."""
        smaller_batch = rung.batch_size < rungs[index].batch_size
        return smaller_batch or (not host and (rung.offload or not low_gpu_mem))

    return next((later for later in range(index + 1, len(rungs)) if needs_less(rungs[later])), None)


def _changes(before: Rung, after: Rung) -> str:
    """List the settings that another rung changes. torch.compile does not depend on the rung."""
    values, earlier = after.model_dump(exclude={"torch_compile"}), before.model_dump()
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != earlier[name])


def kernel_kills() -> int:
    """Count the processes that the kernel has killed for lack of memory, in this control group or on this machine."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                if line.split()[0] == "oom_kill":
                    return int(line.split()[1])
    return 0


def last_block(events: Path) -> str | None:
    """Return the name of the block that the last child was working on; None before its first block."""
    name: str | None = None
    for event in read_events(events)[1]:
        if isinstance(event, BlockStarted):
            name = event.name
        elif isinstance(event, SettingsChosen):
            name = None
    return name


def last_settings(events: Path) -> SettingsChosen:
    """Return the settings that the last child ran with; none of them is set if no child has chosen any."""
    chosen = [event for event in read_events(events)[1] if isinstance(event, SettingsChosen)]
    return chosen[-1] if chosen else SettingsChosen()


def run_child(job: Job, folder: Path, report: EventSink, deadline_s: float = math.inf) -> Failed | None:
    """Run the child to its end. Returns None if it wrote result.json, else the error, which is its last event.

    Raises QuantizeDied if it ended without either, and StageTimeout if `time.monotonic()` passes `deadline_s`.
    """
    (folder / "job.json").write_text(job.model_dump_json())
    events = folder / "events.jsonl"
    position = events.stat().st_size if events.exists() else 0
    environment = with_package({k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES})
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment["AR_LOG_LEVEL"] = "INFO"  # At this level auto-round's loop logs the losses, which reporting.py reads.
    command = [sys.executable, "-m", "requant.tasks.quantizing.child", str(folder / "job.json"), str(folder)]
    last: Event | None = None
    with (folder / "log.txt").open("ab") as output:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            running = True
            while running:
                # Python needs a second or more to take a large model apart. `_end` does not wait for that.
                running = child.poll() is None and not (folder / "result.json").exists()
                position, new = read_events(events, position)
                for event in new:
                    last = event
                    report(event)
                if time.monotonic() > deadline_s:
                    raise StageTimeout(
                        f"quantize did not end within {TIMEOUT_S / 3600:g} hours; its finished blocks are kept: start "
                        "the run again, and it resumes after them"
                    )
                if running:
                    time.sleep(POLL_INTERVAL_S)
        finally:
            _end(child)
    if (folder / "result.json").exists():
        return None
    if isinstance(last, Failed):
        return last
    code = child.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    raise QuantizeDied(
        f"the quantize process ended with {how}; its finished blocks are kept, and the next run goes on from them "
        f"(its log: {folder / 'log.txt'})",
        killed=code == -signal.SIGKILL,
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and all processes that it has started."""
    if child.stdin is not None:
        child.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
