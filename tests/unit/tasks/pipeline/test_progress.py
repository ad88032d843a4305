"""Progress as a bar on a terminal, and as lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest

from requant.tasks.pipeline.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_a_line_every_thirty_seconds_and_none_before(caplog: pytest.LogCaptureFixture) -> None:
    times_s = iter((0.0, 29.0, 30.0, 59.0, 60.0))
    stream = io.StringIO()
    with (
        caplog.at_level(logging.INFO),
        progress("download", 600, "files", stream=stream, clock=times_s.__next__) as bar,
    ):
        for _ in range(4):
            bar.advance(100)
    assert caplog.messages == [
        "download: 200 of 600 files, 6.67/s, about 1 min left",
        "download: 400 of 600 files, 6.67/s, about 1 min left",
    ]
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    times_s = iter((0.0, 40.0))
    stream = Terminal()
    with (
        caplog.at_level(logging.INFO),
        progress("download", 4 * 10**9, "bytes", stream=stream, clock=times_s.__next__) as bar,
    ):
        bar.advance(2 * 10**9)
    assert "2.00 GB of 4.00 GB, 50.00 MB/s" in stream.getvalue()
    assert caplog.messages == []
