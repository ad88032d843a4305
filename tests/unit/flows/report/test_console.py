"""The width of reports: that of a terminal, and one that fits everything elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from requant.flows.report.console import text_console
from requant.flows.report.terminal import table_of

ROW = ("a-long-name/" * 4, "0.123", "one two three four five", "passed")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def table() -> str:
    console = text_console(110)
    with console.capture() as capture:
        console.print(table_of(("gate", "measured", "limit", ""), [ROW]))
    return capture.get()


@pytest.mark.parametrize("columns", [40, 80])
def test_a_table_is_as_wide_as_the_terminal_and_loses_nothing(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    wide = table()
    monkeypatch.setattr(sys, "stdout", Terminal())
    narrow = table()
    assert max(map(len, wide.splitlines())) > columns >= max(map(len, narrow.splitlines()))
    assert sorted("".join(narrow.split())) == sorted("".join(wide.split()))
