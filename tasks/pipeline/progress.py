"""How far work has come: a bar where a terminal is, elsewhere a log line at most every 30 s."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from requant.tasks.formatting import gigabytes

INTERVAL_S = 30.0
log = logging.getLogger(__name__)


class Bar:
    """Counts what is done. It may be advanced from several threads."""

    def __init__(self, name: str, total: int, unit: str, clock: Callable[[], float], interval_s: float) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._clock, self._interval_s = clock, interval_s
        self._lock = threading.Lock()
        self._done = 0
        self._begun_s = self._said_s = clock()
        self.show: Callable[[str, int], None] | None = None

    def advance(self, count: int) -> None:
        """Add to what is done. On a terminal the bar moves; elsewhere a line is logged if the interval has passed."""
        with self._lock:
            self._done += count
            now_s = self._clock()
            if self.show is not None:
                self.show(self._words(now_s), self._done)
            elif now_s - self._said_s >= self._interval_s:
                self._said_s = now_s
                left_s = (now_s - self._begun_s) * (self._total - self._done) / self._done if self._done else 0.0
                left = f", about {max(1, round(left_s / 60))} min left" if 0 < self._done < self._total else ""
                log.info("%s: %s%s", self._name, self._words(now_s), left)

    def _words(self, now_s: float) -> str:
        rate = self._done / max(now_s - self._begun_s, 1e-9)
        if self._unit == "bytes":
            return f"{gigabytes(self._done)} of {gigabytes(self._total)}, {gigabytes(int(rate))}/s"
        return f"{self._done} of {self._total} {self._unit}, {rate:.3g}/s"


@contextlib.contextmanager
def progress(
    name: str,
    total: int,
    unit: str,
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    interval_s: float = INTERVAL_S,
) -> Iterator[Bar]:
    """Show how far work has come. `unit` is bytes, blocks, tokens, requests or files; `stream` is stderr by default."""
    bar = Bar(name, total, unit, clock, interval_s)
    console = Console(file=stream or sys.stderr)
    if not console.is_terminal or console.is_dumb_terminal:
        yield bar
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(name, total=total, words="")
        bar.show = lambda words, done: shown.update(task, completed=done, words=words)
        yield bar
