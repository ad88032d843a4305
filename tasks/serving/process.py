"""An engine's process: its log kept, and ended with everything it started, also when this process is killed."""

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

END_TIMEOUT_S = 30.0  # seconds: the guard needs 5 to end an engine that does not listen
# The last line of a Python traceback, or what argparse says; behind what an engine puts before each line.
CAUSE = re.compile(r"(?:^|\s)((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt)\b(?:: .+)?|\S+: error: .+)$")
CALM = re.compile(r"\b(DEBUG|INFO|WARNING)\b")
GENERIC = ("Engine core initialization failed", "initialization failed", "See root cause above", "See stack trace")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Engine:
    """A running engine behind its guard."""

    guard: subprocess.Popen[bytes]
    log: Path

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self.guard.poll()

    def failure(self, what: str) -> EngineFailed:
        """An error that says how it ended, if it did, and which lines of its log say why."""
        status = self.status
        ended = "" if status is None else f", {how(status)}"
        lines = telling_lines(self.log)
        said = f": {' / '.join(lines)}" if lines else ""
        return EngineFailed(f"{what}{ended}{said} (its log: {self.log})")


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[Engine]:
    """Start a command; at the end of the block it and all its processes have ended. Its output goes into `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    own = {k: v for k, v in environment.items() if k not in SECRET_VARIABLES}
    # -c, so that the module path reaches the guard only, and not the engine as PYTHONPATH.
    start = f"import sys; sys.path.insert(0, {str(PACKAGE_PARENT)!r}); from requant.tasks.serving.guard import main; "
    start += "sys.exit(main(sys.argv[1:]))"
    with log.open("wb") as output:
        guard = subprocess.Popen(
            [sys.executable, "-c", start, *command],
            env=own,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield Engine(guard, log)
    finally:
        _end(guard)


def _end(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    guard.stdin.close()
    try:
        guard.wait(END_TIMEOUT_S)
    except BaseException:  # a second Ctrl-C, or a guard that hangs
        guard.terminate()
        raise


def free_port() -> int:
    """A port of loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def how(status: int) -> str:
    """An exit status in words."""
    if status == 128 + 9:
        return "killed with SIGKILL, as the kernel does when memory runs out"
    return f"ended by signal {status - 128}" if status > 128 else f"exit status {status}"


def telling_lines(log: Path, count: int = 2) -> list[str]:
    """The lines of a log that say why its program ended: the first causes, else its last words."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - (4 << 20)))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [ESCAPES.sub("", line).rstrip() for line in text.splitlines()]
    causes: list[str] = []
    for line in lines:
        match = CAUSE.search(line)
        if match and not CALM.search(line) and match[1] not in causes and not any(word in match[1] for word in GENERIC):
            causes.append(match[1])
    found = causes[:count] or [line.strip() for line in lines if line.strip()][-count:]
    return [redact("".join(c if c.isprintable() else "?" for c in line))[:400] for line in found]
