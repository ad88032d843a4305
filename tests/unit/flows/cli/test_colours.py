"""Colours and verbosity of the command line."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from requant.flows.cli.colours import use_colour, with_colours
from requant.flows.cli.main import cli
from requant.tasks.pipeline import log
from requant.tasks.pipeline.log import PrefectLines, set_verbosity, verbosity
from requant.tasks.progress import show

RETRY = "Task run failed with exception: 'the Hub did not answer' - Retry 1/3 will start 0.5814379 second(s) from now"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = log._verbosity, logging.getLogger("requant").level
    yield
    log._verbosity = before[0]
    logging.getLogger("requant").setLevel(before[1])
    show("lines")


@pytest.mark.parametrize(
    ("stream", "environment", "expected"),
    [
        (Terminal(), {}, True),
        (io.StringIO(), {}, False),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, True),
    ],
)
def test_a_terminal_gets_colours_unless_somebody_says_otherwise(
    stream: io.StringIO, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert use_colour(stream) is expected


def test_what_failed_is_red_and_other_words_stay_as_they_are() -> None:
    text = "REJECTED  x\nfinite  0  0  passed\nfiles  1  0  FAILED\nproblem      no disk\nbypassed failed surpassed"
    red, end = "\x1b[31m\x1b[1m", "\x1b[0m"
    assert with_colours(text) == (
        f"{red}REJECTED{end}  x\nfinite  0  0  \x1b[32mpassed{end}\nfiles  1  0  {red}FAILED{end}\n"
        f"{red}problem{end}      no disk\nbypassed failed surpassed"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["schema"], "normal"),
        (["schema", "-q"], "quiet"),
        (["--quiet", "schema"], "quiet"),
        (["schema", "-v"], "verbose"),
        (["-v", "schema"], "verbose"),
    ],
)
def test_a_switch_stands_before_or_after_the_command(arguments: list[str], expected: str) -> None:
    set_verbosity("normal")
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert verbosity() == expected


@pytest.mark.parametrize(
    ("chosen", "name", "message", "kept"),
    [
        ("normal", "prefect.flow_runs", "Beginning flow run 'x'", False),
        ("normal", "prefect.engine", "Crash detected! Execution was aborted by an interrupt signal.", False),
        ("normal", "prefect.task_runs", RETRY, True),
        ("quiet", "prefect.task_runs", RETRY, False),
        ("verbose", "prefect.flow_runs", "Beginning flow run 'x'", True),
        ("quiet", "requant.tasks.download", "a warning of ours", True),
    ],
)  # fmt: skip
def test_prefects_own_lines_are_for_those_who_ask(chosen: log.Verbosity, name: str, message: str, kept: bool) -> None:
    set_verbosity(chosen)
    record = logging.LogRecord(name, logging.INFO, "", 0, message, (), None)
    assert PrefectLines().filter(record) is kept


def test_another_try_is_told_in_few_words() -> None:
    set_verbosity("normal")
    record = logging.LogRecord("prefect.task_runs", logging.ERROR, "", 0, RETRY, (), None)
    assert PrefectLines().filter(record)
    assert record.getMessage() == "the Hub did not answer; try 2 of 4 begins in 0.6 s"
