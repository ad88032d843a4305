"""Progress as bars on a terminal, and as lines elsewhere."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator

import pytest

from requant.tasks.progress import Display, _Count, progress, show


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def lines_again() -> Iterator[None]:
    yield
    show("lines")


@pytest.mark.parametrize(
    ("count", "done", "taken_s", "under_way_s", "line"),
    [
        (_Count("download", 54 * 10**9, "bytes"), 12 * 10**9, 40.0, 0.0,
         "download: 12.00 GB of 54.00 GB, 300.00 MB/s, about 2 min left"),
        (_Count("download", 54 * 10**9, "bytes"), 0, 0.0, 40.0, "download: 0.0 kB of 54.00 GB, 0.0 kB/s"),
        (_Count("quantize", 64, "blocks"), 16, 320.0, 0.0, "quantize: 16 of 64 blocks, 20.0 s each, about 16 min left"),
        (_Count("quantize", 64, "blocks"), 1, 60.0, 3570.0,
         "quantize: 1 of 64 blocks, 60.0 s each, about 4 min left"),
        (_Count("quantize", 64, "blocks"), 1, 60.0, 9999.0, "quantize: 1 of 64 blocks, 60.0 s each"),
        (_Count("bench", 8, "requests"), 8, 2.0, 9.0, "bench: 8 of 8 requests, 4.0/s"),
    ],
)  # fmt: skip
def test_a_line_says_what_is_done_how_fast_and_what_is_left(
    count: _Count, done: int, taken_s: float, under_way_s: float, line: str
) -> None:
    """What is under way does not count as done, however long it takes."""
    count.advance(done)
    count.done_at_s = count.begun_s + taken_s
    assert count.line(count.done_at_s + under_way_s) == line


def test_a_pipe_gets_lines_while_work_is_silent_and_none_after_it(caplog: pytest.LogCaptureFixture) -> None:
    said, expected = threading.Event(), "download: 200 of 600 files, "
    handler = logging.Handler()
    handler.emit = lambda record: said.set() if expected in record.getMessage() else None  # type: ignore[method-assign]
    logger = logging.getLogger("requant.tasks.progress")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO), progress("download", 600, "files", interval_s=0.01) as bar:
            bar.advance(200)
            assert said.wait(30)
        written = len(caplog.messages)
        assert caplog.messages[-1].startswith(expected)
    finally:
        logger.removeHandler(handler)
    assert len(caplog.messages) == written and threading.active_count() == len(threading.enumerate())


def test_work_that_is_shorter_than_the_interval_gets_no_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress("download", 600, "files") as bar:
        bar.advance(600)
    assert caplog.messages == []


@pytest.mark.parametrize("columns", ["100", "40"])
def test_a_terminal_gets_bars_that_go_away_with_lines_above_them(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    show("bars")
    with progress("download", 4 * 10**9, "bytes") as outer, progress("hash", 10, "files") as inner:
        outer.advance(2 * 10**9)
        inner.advance()
        print("a line", file=sys.stderr)
    shown = stream.getvalue()
    assert "download" in shown and "a line\n" in shown.replace("\r", "")
    assert "2.00 GB of 4.00 GB" in shown and "1 of 10 files" in shown
    assert shown.rstrip("\r").endswith("\x1b[2K\x1b[?25h")  # The line is empty, and the cursor is shown.


@pytest.mark.parametrize("display", ["lines", "nothing", "bars"])
def test_threads_add_up(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    show(display)
    count = _Count("x", 4000, "files")
    with progress("x", 4000, "files") as bar:
        threads = [
            threading.Thread(target=lambda: [(bar.advance(), count.advance()) for _ in range(1000)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert count.done == 4000
