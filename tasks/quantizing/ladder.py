"""Run the child process until it succeeds: watch it, and start it again with settings that need less memory.

`ladder.json` in the work folder holds the position on the ladder of settings and all attempts. It survives a crash, so
that the next run does not fail again where an earlier one did.
"""

from __future__ import annotations

import contextlib
import json
import logging
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
from requant.tasks.quantizing.job import Job, JobResult, Rung

log = logging.getLogger(__name__)

TIMEOUT_S = 48 * 3600.0
POLL_INTERVAL_S = 0.3
MAX_DEATHS = 3  # A child that dies so many times in a row in one block, and by SIGKILL, has run out of memory.


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
    """A rung that was tried, how that ended, and in which block unless it succeeded."""

    ended: str
    block: str | None = None


class Progress:
    """The file `ladder.json`: the rung, all attempts, and how often the child died in the last block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rung, self.compiled = 0, True
        self.attempts: list[Attempt] = []
        self.deaths: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(path.read_text())
            self.attempts = [Attempt.model_validate(attempt) for attempt in saved["attempts"]]
            self.rung, self.compiled, self.deaths = int(saved["rung"]), bool(saved["compiled"]), dict(saved["deaths"])

    def save(self) -> None:
        """Replace the file."""
        attempts = [attempt.model_dump(exclude_unset=True) for attempt in self.attempts]
        document = {"rung": self.rung, "compiled": self.compiled, "attempts": attempts, "deaths": self.deaths}
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
        self.deaths = {str(block): self.deaths.get(str(block), 0) + 1}
        return self.deaths[str(block)]


def down_the_ladder(job: Job, folder: Path, report: EventSink) -> tuple[JobResult, list[Attempt]]:
    """Run the child with one rung after another until it succeeds; `report` gets its events as they come.

    Returns its result and all attempts, those of earlier runs in this folder included. Raises QuantizeFailed,
    OutOfMemory below the last rung, QuantizeDied if the child was killed from outside, and StageTimeout.
    """
    progress = Progress(folder / "ladder.json")
    events, log_file, result_path = folder / "events.jsonl", folder / "log.txt", folder / "result.json"
    rungs = list(ladder(job.rung))
    while not result_path.exists():
        rung = rungs[min(progress.rung, len(rungs) - 1)]
        if not progress.compiled:
            rung = rung.model_copy(update={"torch_compile": False})
        kills_before = kernel_kills()
        try:
            error = run_child(job.model_copy(update={"rung": rung}), folder, report)
        except QuantizeDied as died:
            block = last_block(events)
            out_of_memory = progress.count_death(block) >= MAX_DEATHS or kernel_kills() > kills_before
            if not (died.killed and out_of_memory):
                progress.add(rung, "died", block)
                raise
            error = Failed(kind="host oom", text=str(died))
        if error is None:
            progress.add(rung, "done")
            break
        block = last_block(events)
        progress.add(rung, error.kind, block)
        if error.kind == "compile" and progress.compiled:
            log.info("torch.compile failed: going on without it")
            progress.compiled = False
        elif error.kind in {"oom", "host oom"}:
            where = block or "the calibration"
            progress.rung = _next_rung(rungs, progress.rung, events, host=error.kind == "host oom")
            progress.deaths = {}
            if progress.rung >= len(rungs):
                raise OutOfMemory(
                    f"out of memory even with one sample a step, in {where} ({log_file}): use a machine or a device "
                    "with more memory"
                )
            log.info(f"out of memory in {where}: going on from there with {_changes(rung, rungs[progress.rung])}")
        elif error.kind == "refused":
            raise QuantizeFailed(error.text)
        else:
            raise QuantizeFailed(f"auto-round failed: {error.text} (its log: {log_file})")
        progress.save()
    return JobResult.model_validate_json(result_path.read_text()), progress.attempts


def _next_rung(rungs: Sequence[Rung], number: int, events: Path, *, host: bool) -> int:
    """Return the number of the next rung after one that ran out of memory: of the machine's if `host`, else the GPU's.

    Where low_gpu_mem does not help, the rungs with the same batch size are skipped: if the child used it already, or if
    the memory that ran out is the machine's, to which low_gpu_mem moves the samples.
    """
    same_batch_helps = not host and last_settings(events).low_gpu_mem is not True
    following = number + 1
    while following < len(rungs) and not same_batch_helps and rungs[following].batch_size == rungs[number].batch_size:
        if rungs[following].offload and not host:
            break
        following += 1
    return following


def _changes(before: Rung, after: Rung) -> str:
    """List the settings that another rung changes. torch.compile is not a matter of the rung."""
    values, earlier = after.model_dump(exclude={"torch_compile"}), before.model_dump()
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != earlier[name])


def kernel_kills() -> int:
    """Count the processes that the kernel has killed for lack of memory, in this control group or on this machine."""
    for path, name in ((Path("/sys/fs/cgroup/memory.events"), "oom_kill"), (Path("/proc/vmstat"), "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                if line.split()[0] == name:
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


def run_child(job: Job, folder: Path, report: EventSink, timeout_s: float = TIMEOUT_S) -> Failed | None:
    """Run the child to its end. Returns None if it wrote result.json, else the error, which is its last event.

    Raises QuantizeDied if it ended without either, and StageTimeout.
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
        deadline = time.monotonic() + timeout_s
        try:
            running = True
            while running:
                running = child.poll() is None
                position, new = read_events(events, position)
                for event in new:
                    last = event
                    report(event)
                if time.monotonic() > deadline:
                    raise StageTimeout(f"quantize ran for {timeout_s / 3600:.0f} hours: its finished blocks are kept")
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
    died = QuantizeDied(
        f"the quantize process ended with {how}; its finished blocks are kept, and the next run goes on from them "
        f"(its log: {folder / 'log.txt'})"
    )
    died.killed = code == -signal.SIGKILL
    raise died


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and all processes that it has started."""
    if child.stdin is not None:
        child.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
