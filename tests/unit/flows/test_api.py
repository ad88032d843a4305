"""The Python API: what `import requant` exports, and the process of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

import requant
from requant.flows import api
from requant.flows.report.document import RunDocument
from requant.tasks.errors import CheckpointError, RecipeError
from tests.factories.paths import ROOT
from tests.factories.reports import RECIPE, finished


def test_the_package_exports_functions_and_imports_nothing_before_they_are_used() -> None:
    code = "import sys, requant; print([name for name in sys.modules if 'requant.' in name])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and set(requant.__all__) <= set(dir(requant))
    for name in requant.__all__:
        assert getattr(requant, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        requant.quantise  # type: ignore[attr-defined]  # noqa: B018


def test_a_document_of_a_run_is_read_as_it_was_written() -> None:
    document = finished().document()
    assert RunDocument.from_json(document.to_json()) == document
    assert RunDocument.from_json({**document.to_json(), "later": 1}) == document
    with pytest.raises(requant.RequantError, match=r"\(status: Input should be 'published'"):
        RunDocument.from_json({**document.to_json(), "status": "great"})


def test_a_recipe_is_a_file_or_an_object(tmp_path: Path) -> None:
    assert api.read_recipe(RECIPE) is RECIPE
    (tmp_path / "recipe.yaml").write_text("base: {repo_id: owner/name}")
    changed = api.read_recipe(tmp_path / "recipe.yaml", ["quantize.iters=7"])
    assert changed == api.read_recipe(str(tmp_path / "recipe.yaml"), ("quantize.iters=7",))
    assert changed.quantize.iters == 7
    with pytest.raises(RecipeError, match=r"Recipe\.model_validate"):
        api.read_recipe(RECIPE, ["quantize.iters=7"])


def test_paths_in_a_recipe_object_are_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` writes the recipe to a file elsewhere, whose own folder means nothing to the user."""
    (tmp_path / "own.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    document = {"base": {"repo_id": "owner/name"}, "quantize": {"calibration": "own.txt"}}
    recipe = requant.Recipe.model_validate(document | {"validation": {"text": "./own.txt"}})
    written: list[requant.Recipe] = []

    def load(arguments: list[str]) -> tuple[int, dict[str, object]]:
        written.append(api.read_recipe(arguments[1]))
        return 0, finished().document().to_json()

    monkeypatch.setattr(api, "_run_command", load)
    requant.run(recipe)
    for loaded in (written[0], api.read_recipe(recipe)):
        assert loaded.quantize.calibration == loaded.validation.text == str(tmp_path / "own.txt")
    with pytest.raises(RecipeError, match=r"calibration: the file .*other\.txt does not exist"):
        api.read_recipe(requant.Recipe.model_validate(document | {"quantize": {"calibration": "other.txt"}}))


@pytest.mark.parametrize(
    ("exit_status", "document", "error"),
    [
        (2, api.error_document("the recipe is wrong"), "the recipe is wrong"),
        (1, api.error_document("no store"), "no store"),
        (-9, {}, "ended with exit status -9 and printed no document"),
        (1, {**api.error_document("x"), "surprise": 1}, "base: Field required"),
    ],
)
def test_a_run_without_a_document_of_its_own_is_an_error(
    exit_status: int, document: dict[str, object], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_run_command", lambda arguments: (exit_status, document))
    with pytest.raises(requant.RequantError, match=error) as caught:
        requant.run(RECIPE)
    assert isinstance(caught.value, RecipeError) == (exit_status == 2)


def test_a_folder_that_is_no_checkpoint_is_an_error_of_the_package(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        requant.inspect(tmp_path)
    assert issubclass(CheckpointError, requant.RequantError)


def test_an_interrupt_ends_the_process_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process writes a line when it can be interrupted; a person then presses Ctrl-C."""
    code = "import sys, time\ntry: print('begun', file=sys.stderr, flush=True); time.sleep(100)\n"
    code += "except KeyboardInterrupt: sys.exit(130)\n"
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], **options: int) -> subprocess.Popen[str]:
        started.append(
            popen([sys.executable, "-c", code], text=True, stdout=options["stdout"], stderr=options["stderr"])
        )
        return started[0]

    def interrupt(lines: IO[str]) -> None:
        assert lines.readline() == "begun\n"
        os.kill(os.getpid(), signal.SIGINT)

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(api, "_forward", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background job ignores SIGINT.
    try:
        with pytest.raises(KeyboardInterrupt):
            requant.run(RECIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].returncode == 130
