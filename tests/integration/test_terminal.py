"""What a terminal shows of a command, and what a pipe gets."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factories.paths import ROOT

BAR, COLOUR, ESCAPE = "━", "\x1b[3", "\x1b"
RED_PROBLEM = "\x1b[31m\x1b[1mproblem\x1b[0m"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is no release, which `verify` says after it has read every byte."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def shown(folder: Path, *arguments: str, terminal: bool = True, **environment: str) -> str:
    """Return what `requant verify` writes to a terminal, or to a pipe."""
    plain = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    plain |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", **environment}
    command = [sys.executable, "-m", "requant", *arguments, "verify", str(folder)]
    if not terminal:
        return subprocess.run(
            command, env=plain, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        ).stdout
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=plain, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    data = b""
    try:
        while chunk := os.read(ours, 65536):
            data += chunk
    except OSError:  # Linux says so when the process has ended.
        pass
    finally:
        os.close(ours)
        process.wait()
    return data.decode()


def test_a_terminal_gets_a_bar_and_colours(folder: Path) -> None:
    text = shown(folder)
    assert BAR in text
    assert RED_PROBLEM in text


@pytest.mark.parametrize(
    ("arguments", "terminal", "environment", "absent"),
    [
        (("-q",), True, {}, BAR),
        ((), True, {"NO_COLOR": "1"}, COLOUR),
        ((), True, {"TERM": "dumb"}, ESCAPE),
        ((), False, {}, ESCAPE),
    ],
)
def test_who_wants_none_gets_none(
    folder: Path, arguments: tuple[str, ...], terminal: bool, environment: dict[str, str], absent: str
) -> None:
    text = shown(folder, *arguments, terminal=terminal, **environment)
    assert "problem" in text and "has no requant.json" in text
    assert absent not in text
