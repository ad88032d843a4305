"""No command reports its use to anybody, on a machine where nothing says that it must not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from requant.startup import NO_TELEMETRY
from requant.tasks.environment import with_package

# Every Python process imports this first. It writes down what would leave the machine, and does not let it.
SITECUSTOMIZE = """
import os, sys
def look(event, details):
    host = None
    if event == "socket.getaddrinfo":
        host = details[0]
    elif event == "socket.connect" and isinstance(details[1], tuple):
        host = details[1][0]
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        with open(os.environ["SEEN"], "a") as file:
            print(host, file=file)
        raise OSError("nothing leaves this machine")
sys.addaudithook(look)
"""
OF_CI = {"CI", "GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE"}  # where Prefect reports nothing by itself


class Machine:
    """A new user's machine with a terminal."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
        (folder / "recipes").mkdir()
        (folder / "recipes" / "one.yaml").write_text("base: demo/none\n")
        self.folder, self.seen = folder, folder / "seen"
        kept = {k: v for k, v in environment.items() if k not in {*NO_TELEMETRY, *OF_CI} and "PREFECT" not in k}
        own = {"HOME": str(folder), "SEEN": str(self.seen), "REQUANT_STORE": str(folder / "store")}
        self.environment = with_package({**kept, **own, "PYTHONPATH": str(folder / "site")})

    @property
    def asked(self) -> list[str]:
        """The hosts that somebody wanted to reach."""
        return self.seen.read_text().splitlines() if self.seen.exists() else []

    @property
    def counts_as_user(self) -> bool:
        """Whether Prefect has written down that it has a new user here."""
        return (self.folder / ".prefect" / ".sdk_telemetry").exists()

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run Python with a terminal for its output. Return its exit status and errors."""
        main, terminal = os.openpty()
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=terminal, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        finally:
            os.close(main)
            os.close(terminal)
        return done.returncode, done.stderr


@pytest.fixture
def machine(tmp_path: Path, environment: dict[str, str]) -> Iterator[Machine]:
    yield Machine(tmp_path, environment)


def test_whatever_reports_is_noticed_there(machine: Machine) -> None:
    report = "import prefect, urllib.request; urllib.request.urlopen('http://telemetry.example')"
    _, errors = machine.run("-c", report)
    assert machine.counts_as_user and "usage data" in errors
    assert "telemetry.example" in machine.asked


@pytest.mark.parametrize(
    "command", [["plan", "recipes/one.yaml"], ["run", "recipes/one.yaml"], ["watch", "--once", "--recipes", "recipes"]]
)
def test_a_command_reports_nothing(command: list[str], machine: Machine) -> None:
    status, errors = machine.run("-m", "requant", *command)
    assert status == 1 and "Traceback" not in errors, "the base does not exist"
    assert machine.asked == [] and not machine.counts_as_user and "usage data" not in errors
