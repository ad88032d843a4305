"""Scheduled re-quantization: the server's scheduler starts the watch, and the watch starts the run of a new commit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.factories.paths import ROOT
from tests.factories.requant import wait_for
from tests.factories.stack import BASE, Stack


def deploy(stack: Stack, folder: Path) -> None:
    """Put prefect.yaml on the server, with a watch every 20 seconds over one recipe."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    (watch,) = (each for each in document["deployments"] if each["name"] == "watch")
    watch["schedules"] = [{"interval": 20}]
    (folder / "prefect.yaml").write_text(yaml.safe_dump(document))
    (folder / "recipes").mkdir()
    (folder / "recipes" / "pico.yaml").write_text(yaml.safe_dump(stack.recipe(iters=0)))
    subprocess.run(
        [sys.executable, "-m", "requant", "deploy", str(folder)], env=stack.environment(), cwd=ROOT, check=True
    )


def run_of_newest_commit(stack: Stack) -> str:
    """The run that a watch starts, which the scheduler has started."""
    set_paused(stack, False)
    try:
        sha = stack.sha(BASE)
        return str(wait_for(lambda: stack.started_by_watch(sha), 180, "the watch to start a run"))
    finally:
        set_paused(stack, True)


def set_paused(stack: Stack, paused: bool) -> None:
    watch = stack.ask("GET", "deployments/name/watch/watch")["id"]
    stack.ask("PATCH", f"deployments/{watch}", {"paused": paused})


@pytest.mark.slow
def test_the_scheduler_starts_the_watch_which_starts_a_run_of_a_new_commit_of_a_base(
    stack: Stack, tmp_path: Path
) -> None:
    deploy(stack, tmp_path)
    first = run_of_newest_commit(stack)
    config = json.loads(stack.read(BASE, "config.json"))
    stack.write(BASE, "config.json", json.dumps({**config, "bos_token_id": 1}))
    second = run_of_newest_commit(stack)
    assert first != second
    assert [stack.finish(run)["state"]["name"] for run in (first, second)] == ["Published", "Published"]
    filters = {"deployments": {"name": {"any_": ["watch"]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    completed = stack.ask("POST", "flow_runs/filter", filters)
    assert completed and all(run["auto_scheduled"] for run in completed)
    assert "Traceback" not in (stack.settings.folder / "log" / "prefect-server.log").read_text()
