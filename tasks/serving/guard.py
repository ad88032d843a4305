"""Run a command that cannot outlive the process that started it: `python -m requant.tasks.serving.guard COMMAND...`.

The guard runs between the two, in a session of its own, so that Ctrl-C does not reach it. It ends the command as soon
as its standard input is closed, which also happens when its parent process is killed. It becomes the parent of every
orphan below it, and so finds an engine's workers even if they have detached themselves. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import signal
import subprocess
import sys
import time

import psutil

PR_SET_CHILD_SUBREAPER = 36  # prctl(2): orphans below this process become its children
TERM_TIMEOUT_S = 5.0  # after SIGTERM, before SIGKILL


def main(command: list[str]) -> int:
    """Run the command and return its exit status, or 128 plus the number of the signal that ended it, as shells do."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        while child.poll() is None:
            if select.select([sys.stdin], [], [], 0.2)[0]:  # nothing is ever written: standard input was closed
                return 128 + signal.SIGTERM
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        end_descendants()


def end_descendants() -> None:
    """End every process below this one, with SIGTERM at first and with SIGKILL after TERM_TIMEOUT_S."""
    deadline = time.monotonic() + TERM_TIMEOUT_S
    signal_descendants(signal.SIGTERM)
    while descendants():
        if time.monotonic() > deadline:
            signal_descendants(signal.SIGKILL)
        time.sleep(0.05)


def descendants() -> list[psutil.Process]:
    """Return the processes that run below this one, and reap those that have ended."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.status() == psutil.STATUS_ZOMBIE:
                process.wait(0)
            else:
                running.append(process)
    return running


def signal_descendants(number: signal.Signals) -> None:
    for process in descendants():
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
