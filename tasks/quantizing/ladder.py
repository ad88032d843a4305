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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from requant.tasks.environment import with_package
from requant.tasks.errors import SECRET_VARIABLES, OutOfMemory, QuantizeDied, QuantizeFailed, StageTimeout

log = logging.getLogger(__name__)

TIMEOUT = 48 * 3600.0  # seconds
DEATHS = 3  # by SIGKILL in one block, one after another: taken for the kernel's answer to a lack of memory

Report = Callable[[Mapping[str, Any]], None]


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
    job: Mapping[str, Any], folder: Path, report: Report
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
            error = {"kind": "host oom", "text": str(died)}
        if not error:
            progress.tried(settings, "done", None)
            break
        kind = error["kind"]
        block = last_block(folder / "events.jsonl")
        progress.tried(settings, kind, block)
        if kind == "compile" and progress.compiled:
            log.info("torch.compile failed: going on without it")
            progress.compiled = False
        elif kind in {"oom", "host oom"}:
            host, low = kind == "host oom", last_settings(folder / "events.jsonl").get("low_gpu_mem") is True
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
            raise QuantizeFailed(error["text"])
        else:
            raise QuantizeFailed(f"auto-round failed: {error['text']} (its log: {folder / 'log.txt'})")
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
    """The block that the child was at, None before its first."""
    name: str | None = None
    for event in read_events(events, 0)[1]:
        if event["event"] in {"settings", "block"}:
            name = event.get("name")
    return name


def last_settings(events: Path) -> dict[str, Any]:
    """What the child last made of the settings left to it."""
    found = [event for event in read_events(events, 0)[1] if event["event"] == "settings"]
    return found[-1] if found else {}


def run_child(job: Mapping[str, Any], folder: Path, report: Report, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Run the child to its end. Returns {} if result.json is there, else its `error` event {kind, text}.

    Raises QuantizeDied if it was killed from outside, StageTimeout after `timeout` seconds.
    """
    (folder / "job.json").write_text(json.dumps(job))
    events = folder / "events.jsonl"
    position = events.stat().st_size if events.exists() else 0
    environment = with_package({k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES})
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment["AR_LOG_LEVEL"] = "INFO"  # The losses are read from what auto-round logs at this level (events.py).
    command = [sys.executable, "-m", "requant.tasks.quantizing.child", str(folder / "job.json"), str(folder)]
    last: dict[str, Any] = {}
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
        return {}
    if last.get("event") == "error":
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


def read_events(path: Path, position: int) -> tuple[int, list[dict[str, Any]]]:
    """Whole lines of events.jsonl behind `position`, and the position after them."""
    if not path.exists():
        return position, []
    with path.open("rb") as stream:
        stream.seek(position)
        data = stream.read()
    end = data.rfind(b"\n") + 1
    events = []
    for line in data[:end].splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            events.append(json.loads(line))
    return position + end, events


def blocks_of(events: Path) -> list[dict[str, Any]]:
    """What happened to each block, from all attempts: name, seconds, loss before and after (the last attempt's)."""
    blocks: dict[str, dict[str, Any]] = {}
    name, began = None, 0.0
    for event in read_events(events, 0)[1]:
        if event["event"] == "block":
            name, began = event["name"], event["seconds"]
            starts = blocks.get(name, {}).get("starts", 0)
            blocks[name] = {"name": name, "starts": starts + 1}
        elif event["event"] == "loss" and name is not None:
            blocks[name] |= {"loss_before": event["before"], "loss_after": event["after"]}
            blocks[name] |= {"best_iteration": event["iteration"]} if "iteration" in event else {}
        elif event["event"] == "output" and name is not None:
            blocks[name]["output_error"] = event["error"]
        elif event["event"] == "kept" and name is not None:
            blocks[name] |= {"kept": event["kept"], "compared": event["losses"]}
            blocks[name] |= {"kept_because": event["reason"]} if event.get("reason") else {}
        elif event["event"] in {"loop", "fallback"} and name is not None:
            blocks[name][event["event"]] = event.get("reason") or event.get("text")
        elif event["event"] == "progress" and name is not None:
            blocks[name]["seconds"] = round(event["seconds"] - began, 3)
            if event.get("peak_gpu_bytes") is not None:
                blocks[name]["peak_gpu_bytes"] = event["peak_gpu_bytes"]
    return list(blocks.values())
