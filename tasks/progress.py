"""How far long work has come: bars on a terminal, and elsewhere a log line every 30 s.

The command line chooses with `show`. A worker, a notebook and a pipe get lines.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol

from requant.tasks.background import repeated
from requant.tasks.formatting import format_duration, gigabytes

if TYPE_CHECKING:
    from rich.progress import Progress

Unit = Literal["bytes", "blocks", "tokens", "requests", "runs", "files"]
Display = Literal["bars", "lines", "nothing"]
INTERVAL_S = 30.0
UPDATE_S = 0.1  # between two updates of a bar
log = logging.getLogger(__name__)


class Bar(Protocol):
    """What work reports to. It may be called from several threads."""

    def advance(self, count: int = 1) -> None:
        """Add to what is done."""


class _Count:
    """What is done of a piece of work, and for how long it has been going on."""

    def __init__(self, name: str, total: int, unit: Unit) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self.begun_s = 0, time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int = 1) -> None:
        with self._lock:
            self.done += count

    def words(self, elapsed_s: float) -> str:
        """Say what is done and how fast, as `12.30 GB of 54.00 GB, 310.00 MB/s`."""
        rate = self.done / max(elapsed_s, 1e-9)
        if self.unit == "bytes":
            return f"{gigabytes(self.done)} of {gigabytes(self.total)}, {gigabytes(round(rate))}/s"
        pace = f", {1 / rate:.1f} s each" if 0 < rate < 1 else f", {rate:.1f}/s" if rate else ""
        return f"{self.done} of {self.total} {self.unit}{pace}"

    def line(self, elapsed_s: float) -> str:
        """Say the same with the name of the work and the time left."""
        left_s = elapsed_s * (self.total - self.done) / self.done if self.done else 0.0
        left = f", about {format_duration(left_s)} left" if left_s > 0 else ""
        return f"{self.name}: {self.words(elapsed_s)}{left}"

    def log_line(self) -> None:
        """Log that line for this moment."""
        log.info(self.line(time.monotonic() - self.begun_s))


class _Terminal:
    """The bars of this process, one below the other. Log lines appear above them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._bars = 0

    @contextlib.contextmanager
    def bar(self, count: _Count) -> Iterator[Bar]:
        progress = self._begin()
        task = progress.add_task(count.name, total=count.total, words=count.words(0.0))

        def update(now_s: float) -> None:
            progress.update(task, completed=count.done, words=count.words(now_s - count.begun_s))

        class Shown:
            next_s = 0.0

            def advance(self, more: int = 1) -> None:
                count.advance(more)
                now_s = time.monotonic()
                if now_s >= self.next_s:  # A download calls 16,000 times for each GB.
                    self.next_s = now_s + UPDATE_S
                    update(now_s)

        try:
            yield Shown()
        finally:
            update(time.monotonic())
            progress.refresh()
            progress.remove_task(task)
            self._end()

    def _begin(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        with self._lock:
            if self._progress is None:
                columns: list[Any] = [
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=20),
                    TextColumn("{task.fields[words]}", markup=False),
                    TimeRemainingColumn(compact=True),
                ]
                self._progress = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
                self._progress.start()
            self._bars += 1
            return self._progress

    def _end(self) -> None:
        with self._lock:
            self._bars -= 1
            if self._bars == 0 and self._progress is not None:
                self._progress.stop()
                self._progress = None


_display: Display = "lines"
_terminal = _Terminal()


def show(display: Display) -> None:
    """Choose how progress is shown in this process."""
    global _display
    _display = display


def shows_bars() -> bool:
    """Check whether this process shows bars."""
    return _display == "bars"


@contextlib.contextmanager
def progress(name: str, total: int, unit: Unit, *, interval_s: float = INTERVAL_S) -> Iterator[Bar]:
    """Show how far a piece of work has come, of which `total` is the whole."""
    count = _Count(name, total, unit)
    if _display == "bars":
        with _terminal.bar(count) as bar:
            yield bar
    elif _display == "lines":
        with repeated(count.log_line, interval_s, f"no line about {name}", at_end=False):
            yield count
    else:
        yield count
