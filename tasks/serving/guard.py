"""Run a command that cannot outlive the process that started it: `python -m requant.tasks.serving.guard COMMAND...`.

The guard sits between the two, in a session of its own, where no Ctrl-C reaches it. It ends the command when that
process closes the guard's standard input, which SIGKILL does too; and it adopts whatever the command's processes leave
behind, so that an engine's workers are found however they detached themselves. Linux only.
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

SUBREAPER = 36  # prctl(2): orphans below become children of this process
GRACE_S = 5.0  # seconds between SIGTERM and SIGKILL


def main(command: list[str]) -> int:
    """The command's exit status, as a shell has it: 128 and the signal's number if one ended it."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        while child.poll() is None:
            if select.select([sys.stdin], [], [], 0.2)[0]:  # nobody writes: it is at its end
                return 128 + signal.SIGTERM
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        end_all()


def end_all() -> None:
    """End every process below this one: asked first, then killed, until none is left."""
    deadline = time.monotonic() + GRACE_S
    send(signal.SIGTERM)
    while left():
        if time.monotonic() > deadline:
            send(signal.SIGKILL)
        time.sleep(0.05)


def left() -> list[psutil.Process]:
    """What runs below this process; what has ended is reaped."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.status() == psutil.STATUS_ZOMBIE:
                process.wait(0)
            else:
                running.append(process)
    return running


def send(number: signal.Signals) -> None:
    for process in left():
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
