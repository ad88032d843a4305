"""The process of an engine. It ends with all processes that it started, even if this process is killed."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from requant.tasks.environment import PACKAGE_PARENT
from requant.tasks.errors import SECRET_VARIABLES, EngineFailed, redact

END_TIMEOUT_S = 30.0  # the guard takes up to 5 s to end an engine that ignores SIGTERM
# The last line of a Python traceback, or an error of argparse; an engine may write a prefix before each line.
ERROR_LINE = re.compile(
    r"(?:^|\s)((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt)\b(?:: .+)?|\S+: error: .+)$"
)
LOG_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING)\b")
GENERIC_ERRORS = (
    "Engine core initialization failed",
    "initialization failed",
    "See root cause above",
    "See stack trace",
)
TERMINAL_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class EngineProcess:
    """An engine that runs under a guard (guard.py)."""

    guard: subprocess.Popen[bytes]
    log: Path

    @property
    def status(self) -> int | None:
        """The exit status; None while the engine runs."""
        return self.guard.poll()

    def failure(self, what: str) -> EngineFailed:
        """Make an error of a sentence, how the engine ended if it did, and the lines of its log that say why."""
        status = self.status
        ended = "" if status is None else f", {describe_status(status)}"
        lines = error_lines(self.log)
        reason = f": {' / '.join(lines)}" if lines else ""
        return EngineFailed(f"{what}{ended}{reason} (its log: {self.log})")


@contextlib.contextmanager
def run_engine(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[EngineProcess]:
    """Run a command with its output in `log`; at the end of the block, it and all its processes have ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    public = {k: v for k, v in environment.items() if k not in SECRET_VARIABLES}
    # The guard is started with -c because PYTHONPATH would reach the engine too, which has packages of its own.
    start = f"import sys; sys.path.insert(0, {str(PACKAGE_PARENT)!r}); from requant.tasks.serving.guard import main; "
    start += "sys.exit(main(sys.argv[1:]))"
    with log.open("wb") as output:
        guard = subprocess.Popen(
            [sys.executable, "-c", start, *command],
            env=public,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield EngineProcess(guard, log)
    finally:
        _end(guard)


def _end(guard: subprocess.Popen[bytes]) -> None:
    """Let the guard end the engine, and wait for it."""
    assert guard.stdin is not None
    guard.stdin.close()
    try:
        guard.wait(END_TIMEOUT_S)
    except BaseException:  # a second Ctrl-C, or a time-out
        guard.terminate()
        raise


def free_port() -> int:
    """Find a port of the loopback interface that no process listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def describe_status(status: int) -> str:
    """Describe an exit status as the guard returns it."""
    if status == 128 + 9:
        return "killed with SIGKILL, as the kernel does when memory runs out"
    return f"ended by signal {status - 128}" if status > 128 else f"exit status {status}"


def error_lines(log: Path, count: int = 2) -> list[str]:
    """Return the lines of a log that say why its program ended: the first errors in it, otherwise its last lines."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - (4 << 20)))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [TERMINAL_ESCAPE.sub("", line).rstrip() for line in text.splitlines()]
    errors: list[str] = []
    for line in lines:
        match = ERROR_LINE.search(line)
        if match is None or LOG_LEVEL.search(line) or any(words in match[1] for words in GENERIC_ERRORS):
            continue
        if match[1] not in errors:
            errors.append(match[1])
    chosen = errors[:count] or [line.strip() for line in lines if line.strip()][-count:]
    return [redact("".join(c if c.isprintable() else "?" for c in line))[:400] for line in chosen]
