"""The functions of `import requant`, on what a real run made."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest

import requant as api
from requant.flows.report.document import RunDocument
from tests.factories.paths import ROOT
from tests.factories.requant import LAYERS, Outcome, Requant


@pytest.fixture
def settings(requant: Requant, monkeypatch: pytest.MonkeyPatch) -> Requant:
    """Give this process the environment of a command, as a notebook would have it."""
    for name, value in requant.environment.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    return requant


def test_a_run_in_a_notebook_returns_its_document_again_and_again(
    settings: Requant, finished: tuple[Requant, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    """A notebook has an event loop, in which Prefect's client behaves otherwise, and runs more than once."""
    recipe = settings.write_recipe()

    async def cell() -> list[RunDocument]:
        return [
            api.run(recipe, checkout=settings.folder / "result"),
            api.run(api.Recipe.model_validate(settings.recipe)),
        ]

    documents = asyncio.run(cell())
    assert {stage.state for document in documents for stage in document.stages if stage.name != "publish"} == {"reused"}
    assert [document.artifact.digest for document in documents] == [finished[1].digest] * 2
    document = documents[0]
    assert document.published is not None and not document.published.changed
    assert document.measured is not None and document.measured.audit.packed == 6 * (LAYERS - 1) + 7
    assert document.artifact.path == str(settings.folder / "result")
    unchanged = json.loads(json.dumps(finished[1].document))
    written = document.to_json()
    for key in ("gates", "benchmark", "measured", "base"):
        assert written[key] == unchanged[key], key
    assert "reused" in capsys.readouterr().err


def test_a_run_that_fails_returns_why_and_one_that_cannot_begin_raises_it(
    settings: Requant, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = api.run(settings.write_recipe(base={"repo_id": "demo/nowhere"}))
    assert document.status == "failed" and "demo/nowhere does not exist" in str(document.error)
    monkeypatch.setenv("REQUANT_STORE", "ftp://elsewhere")
    with pytest.raises(api.RequantError, match="ftp://elsewhere"):
        api.run(settings.write_recipe())


SCRIPT = """
import json, sys, requant
result, recipe = sys.argv[1:]
planned = requant.plan(recipe)
print(json.dumps({
    "inspect": requant.inspect(result).to_json(),
    "head of the base": requant.inspect("demo/pico").mtp.layout,
    "verify": requant.verify("me/pico").to_json(),
    "mtp-fix": requant.mtp_fix(result, base="demo/pico", dry_run=True).to_json(),
    "plan": [planned.problems, sorted({stage.state for stage in planned.stages})],
}))
"""


def test_the_functions_return_what_the_commands_print(requant: Requant, finished: tuple[Requant, Outcome]) -> None:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    result = str(finished[0].folder / "checkout")
    command = [sys.executable, "-c", SCRIPT, result, str(requant.write_recipe())]
    done = subprocess.run(command, cwd=ROOT, env=requant.environment, capture_output=True, text=True, check=True)
    documents = json.loads(done.stdout)
    assert documents["inspect"] == requant("inspect", result, "--json").document
    assert documents["head of the base"] == "mtp"
    assert documents["verify"] == requant("verify", "me/pico", "--json").document
    repaired = requant("mtp-fix", result, "--base", "demo/pico", "--dry-run", "--json").document
    assert documents["mtp-fix"] == repaired and not repaired["changed"]
    assert documents["plan"] == [[], ["reused"]]
