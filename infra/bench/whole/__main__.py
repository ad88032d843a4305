"""`make run-27b`: start the run or wait for it, and print what was measured.

    make run-27b                        # 64 layers, 200 iterations; ends after MINUTES=9 at most
    make run-27b LAYERS=8 ITERS=50      # a piece
    make run-27b LAYERS=0 ITERS=2       # a tiny model, on a CPU

The work happens in a session of its own. The same command again waits for it, or goes on with it if it was killed.
Exit status: 0 done, 1 failed, 75 still working.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
STILL_WORKING = 75


def main() -> int:
    """Start the worker if none works, and wait until it ends or the time is over."""
    parser = argparse.ArgumentParser(prog="make run-27b")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "run-27b")
    asked = parser.parse_args()
    folder: Path = asked.folder / f"{asked.layers}-layers-{asked.iters}-iterations"
    folder.mkdir(parents=True, exist_ok=True)
    status, pid = folder / "status", folder / "pid"
    if not (status.exists() or _works(pid)):
        words = ["infra.bench.whole.worker", str(folder.resolve()), str(asked.layers), str(asked.iters)]
        with (folder / "log.txt").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        pid.write_text(str(worker.pid))
    end_s = time.monotonic() + 60 * asked.minutes
    while not status.exists() and _works(pid) and time.monotonic() < end_s:
        time.sleep(1)
    print(_tail(folder / "log.txt"))
    if not status.exists():
        print("still working" if _works(pid) else "the worker has ended: the same command goes on")
        return STILL_WORKING
    if (folder / "figures.md").exists():
        print((folder / "figures.md").read_text())
    return 0 if status.read_text() == "0" else 1


def _works(pid: Path) -> bool:
    """Check whether the worker that a file names is alive."""
    try:
        number = int(pid.read_text())
        os.waitpid(number, os.WNOHANG)  # A child that has ended is gone then.
    except (OSError, ValueError):
        pass
    try:
        os.kill(int(pid.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:]) if log.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
