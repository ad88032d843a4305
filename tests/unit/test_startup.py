"""The start of the command line: Ctrl-C while it imports, and nothing that reports its use to somebody."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from requant.startup import INTERRUPTED, NO_TELEMETRY, interruptible, turn_off_telemetry
from tests.factories.paths import ROOT

# Runs `python -m requant ARGUMENTS...`, and sends a signal to itself when the module is imported.
PROGRAM = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
number, module, *arguments = sys.argv[1:]
def look(event, details):
    if event == "import" and details[0] == module:
        os.kill(os.getpid(), int(number))
sys.addaudithook(look)
sys.argv = ["requant", *arguments]
runpy.run_module("requant", run_name="__main__", alter_sys=True)
"""
SENTENCE = f"\nrequant: {INTERRUPTED}\n"


def interrupted(folder: Path, module: str, *arguments: str, number: int = signal.SIGINT) -> tuple[int, str, str]:
    """Run a command that gets a signal while it imports a module. Return its exit status, stdout and stderr."""
    command = [sys.executable, "-c", PROGRAM, str(number), module, *arguments]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "REQUANT_STORE": str(folder / "store"), "HOME": str(folder)}
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, start_new_session=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: me/model\n")
    return str(path)


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("plan", "requant.flows.cli.main"),  # the first module of all
        ("plan", "click"),
        ("plan", "numpy"),
        ("inspect", "requant.tasks.checkpoint.inspect"),  # The command itself takes less time than its imports.
        ("run -q", "prefect.context"),  # The embedded server is starting. Without -q, a line says so before.
    ],
)
def test_ctrl_c_during_an_import_is_one_sentence_and_130(
    command: str, module: str, recipe: str, tmp_path: Path
) -> None:
    assert interrupted(tmp_path, module, *command.split(), recipe) == (130, "", SENTENCE)


@pytest.mark.parametrize("module", ["click", "pydantic_core"])
def test_with_json_an_interrupted_command_prints_a_document(module: str, recipe: str, tmp_path: Path) -> None:
    status, output, errors = interrupted(tmp_path, module, "plan", recipe, "--json", number=signal.SIGTERM)
    assert (status, json.loads(output)["error"], errors) == (130, INTERRUPTED, SENTENCE)


@pytest.mark.parametrize("reaction", ["pass", "raise ImportError('no numpy')"])
def test_a_module_that_catches_everything_does_not_swallow_an_interrupt(
    reaction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"catches_{len(reaction)}"
    code = f"import signal\ntry:\n    signal.raise_signal(2)\nexcept BaseException:\n    {reaction}\nwhole = True\n"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible(), contextlib.suppress(ImportError):
            importlib.import_module(name)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and sys.gettrace() is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_background_job_of_a_shell_goes_on_when_somebody_presses_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_user_says_of_telemetry_stays() -> None:
    environment = {"DO_NOT_TRACK": "0"}
    turn_off_telemetry(environment)
    assert environment == {**NO_TELEMETRY, "DO_NOT_TRACK": "0"}


def test_garbage_is_collected_as_usual_once_models_are_there() -> None:
    code = (
        "import gc, requant.startup as startup; usual = gc.get_threshold(); startup.collect_garbage_rarely(); "
        "rare = gc.get_threshold(); import requant.tasks.validating.model; print(rare > usual == gc.get_threshold())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
