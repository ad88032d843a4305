"""Running the quantize child to its end: watched, started again with less memory, and what it did.

Below the work folder, next to what the child keeps there, lies `ladder.json`: how far down the ladder of settings it
is, and every attempt. It is read again after a crash, so that a run does not fail twice in the same place.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from requant.tasks.environment import with_package
from requant.tasks.errors import SECRET_VARIABLES, OutOfMemory, QuantizeDied, QuantizeFailed, StageTimeout
from requant.tasks.quantizing.events import (
    BlockDone,
    BlockLoss,
    BlockOutput,
    BlockStarted,
    CompileFailed,
    Event,
    EventSink,
    Failed,
    LoopChosen,
    RoundingKept,
    SettingsChosen,
    read_events,
)

log = logging.getLogger(__name__)

TIMEOUT = 48 * 3600.0  # seconds
DEATHS = 3  # by SIGKILL in one block, one after another: taken for the kernel's answer to a lack of memory


def ladder(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The job as asked, then settings that need less memory and give the same result but for float noise."""
    rung: dict[str, Any] = {**job, "gradient_accumulate_steps": 1}
    yield rung
    if rung["low_gpu_mem"] is not True:  # it may be "auto"
        rung = {**rung, "low_gpu_mem": True}
        yield rung
    asked = job["batch_size"]
    for batch in (size for size in range(asked // 2, 0, -1) if asked % size == 0):
        rung = {**rung, "batch_size": batch, "gradient_accumulate_steps": asked // batch}
        yield rung
    yield {**rung, "offload": True}


class Progress:
    """`ladder.json`: the rung, every attempt, and how often the child was killed in which block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rung, self.compiled = 0, True
        self.attempts: list[dict[str, Any]] = []
        self.deaths: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text())
            self.rung, self.compiled = int(kept["rung"]), bool(kept["compiled"])
            self.attempts, self.deaths = list(kept["attempts"]), dict(kept["deaths"])

    def keep(self) -> None:
        temporary = self._path.with_suffix(".part")
        kept = {"rung": self.rung, "compiled": self.compiled, "attempts": self.attempts, "deaths": self.deaths}
        temporary.write_text(json.dumps(kept))
        os.replace(temporary, self._path)

    def tried(self, settings: Mapping[str, Any], ended: str, block: str | None) -> None:
        names = ("batch_size", "gradient_accumulate_steps", "low_gpu_mem", "torch_compile", "offload")
        asked = {name: settings[name] for name in names if name in settings}
        self.attempts.append({**asked, "ended": ended, **({"block": block} if block and ended != "done" else {})})
        self.keep()


def down_the_ladder(
    job: Mapping[str, Any], folder: Path, report: EventSink
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the child with each rung until one ends well; returns its result and what was tried, also in earlier runs."""
    progress = Progress(folder / "ladder.json")
    result_path = folder / "result.json"
    rungs = list(ladder(job))
    while not result_path.exists():
        settings = dict(rungs[min(progress.rung, len(rungs) - 1)])
        if not progress.compiled:
            settings["torch_compile"] = False
        kills = kernel_kills()
        block = None
        try:
            error = run_child(settings, folder, report)
        except QuantizeDied as died:
            block = last_block(folder / "events.jsonl")
            progress.deaths = {str(block): progress.deaths.get(str(block), 0) + 1}
            starved = kernel_kills() > kills or progress.deaths[str(block)] >= DEATHS
            if not (died.killed and starved):
                progress.tried(settings, "died", block)
                raise
            error = Failed(kind="host oom", text=str(died))
        if error is None:
            progress.tried(settings, "done", None)
            break
        kind = error.kind
        block = last_block(folder / "events.jsonl")
        progress.tried(settings, kind, block)
        if kind == "compile" and progress.compiled:
            log.info("torch.compile failed: going on without it")
            progress.compiled = False
        elif kind in {"oom", "host oom"}:
            host, low = kind == "host oom", last_settings(folder / "events.jsonl").low_gpu_mem is True
            progress.rung = _next_rung(rungs, progress.rung, skips=host or low, host=host)
            progress.deaths = {}
            if progress.rung >= len(rungs):
                raise OutOfMemory(
                    f"out of memory even with one sample a step, in {block or 'the calibration'} "
                    f"({folder / 'log.txt'}): use a machine or a device with more memory"
                )
            now = {k: v for k, v in rungs[progress.rung].items() if rungs[progress.rung][k] != settings.get(k)}
            changed = ", ".join(f"{k} {v}" for k, v in now.items() if k != "torch_compile")
            log.info(f"out of memory in {block or 'the calibration'}: going on from there with {changed}")
        elif kind == "refused":
            raise QuantizeFailed(error.text)
        else:
            raise QuantizeFailed(f"auto-round failed: {error.text} (its log: {folder / 'log.txt'})")
        progress.keep()
    result: dict[str, Any] = json.loads(result_path.read_text())
    return result, progress.attempts


def _next_rung(rungs: list[dict[str, Any]], rung: int, *, skips: bool, host: bool) -> int:
    """The next rung; one with a smaller batch where low_gpu_mem brings nothing: it is on, or the machine's own memory
    (`host`), to which it moves the samples, is what ran out.
    """
    following = rung + 1
    while following < len(rungs) and skips and rungs[following]["batch_size"] == rungs[rung]["batch_size"]:
        if rungs[following].get("offload") and not host:
            break
        following += 1
    return following


def kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory, in this control group or else on this machine."""
    for path, name in ((Path("/sys/fs/cgroup/memory.events"), "oom_kill"), (Path("/proc/vmstat"), "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                if line.split()[0] == name:
                    return int(line.split()[1])
    return 0


def last_block(events: Path) -> str | None:
    """Name the block that the child was at, None before its first."""
    name: str | None = None
    for event in read_events(events)[1]:
        if isinstance(event, BlockStarted):
            name = event.name
        elif isinstance(event, SettingsChosen):
            name = None
    return name


def last_settings(events: Path) -> SettingsChosen:
    """Look up what the child last made of the settings left to it; none of them is set if it never came so far."""
    found = [event for event in read_events(events)[1] if isinstance(event, SettingsChosen)]
    return found[-1] if found else SettingsChosen()


def run_child(job: Mapping[str, Any], folder: Path, report: EventSink, timeout: float = TIMEOUT) -> Failed | None:
    """Run the child to its end. Returns None if result.json is there, else its last event, the error.

    Raises QuantizeDied if it was killed from outside, StageTimeout after `timeout` seconds.
    """
    (folder / "job.json").write_text(json.dumps(job))
    events = folder / "events.jsonl"
    position = events.stat().st_size if events.exists() else 0
    environment = with_package({k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES})
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment["AR_LOG_LEVEL"] = "INFO"  # At this level its own loop logs its losses (reporting.py reads them).
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
        deadline = time.monotonic() + timeout
        try:
            running = True
            while running:
                running = child.poll() is None
                position, new = read_events(events, position)
                for event in new:
                    last = event
                    report(event)
                if time.monotonic() > deadline:
                    raise StageTimeout(f"quantize ran for {timeout / 3600:.0f} hours: its finished blocks are kept")
                if running:
                    time.sleep(0.3)
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
    """End the child and everything it started."""
    if child.stdin is not None:
        child.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def tuned_blocks(events: Path) -> list[dict[str, Any]]:
    """Tell what happened to each block in all attempts: name, seconds, loss before and after (the last attempt's)."""
    blocks: dict[str, dict[str, Any]] = {}
    block: dict[str, Any] | None = None
    began = 0.0
    for event in read_events(events)[1]:
        if isinstance(event, BlockStarted):
            starts = blocks.get(event.name, {}).get("starts", 0)
            block = blocks[event.name] = {"name": event.name, "starts": starts + 1}
            began = event.seconds
        elif block is not None:
            block |= _told_of_block(event, began)
    return list(blocks.values())


def _told_of_block(event: Event, began: float) -> dict[str, Any]:
    """List what an event adds to the record of the block that it happened in, which `began` at that second."""
    match event:
        case BlockLoss():
            found = {} if event.iteration is None else {"best_iteration": event.iteration}
            return {"loss_before": event.before, "loss_after": event.after, **found}
        case BlockOutput():
            return {"output_error": event.error}
        case RoundingKept():
            because = {"kept_because": event.reason} if event.reason else {}
            return {"kept": event.kept, "compared": event.losses, **because}
        case LoopChosen():
            return {"loop": event.reason}
        case CompileFailed():
            return {"fallback": event.text}
        case BlockDone():
            peak = {} if event.peak_gpu_bytes is None else {"peak_gpu_bytes": event.peak_gpu_bytes}
            return {"seconds": round(event.seconds - began, 3), **peak}
    return {}
