"""Scheduled re-quantization: the server's scheduler starts the watch, and the watch starts the run of a new commit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.stack import BASE, Stack, wait_for

ROOT = Path(__file__).parent.parent.parent


def deploy(stack: Stack, folder: Path) -> None:
    """Put prefect.yaml on the server, with a watch every three seconds over one recipe."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    (watch,) = (each for each in document["deployments"] if each["name"] == "watch")
    watch["schedules"] = [{"interval": 3}]
    (folder / "prefect.yaml").write_text(yaml.safe_dump(document))
    (folder / "recipes").mkdir()
    (folder / "recipes" / "pico.yaml").write_text(yaml.safe_dump(stack.recipe(iters=0)))
    subprocess.run(
        [sys.executable, "-m", "flows.cli", "deploy", str(folder)], env=stack.environment(), cwd=ROOT, check=True
    )


def set_paused(stack: Stack, paused: bool) -> None:
    watch = stack.ask("GET", "deployments/name/watch/watch")["id"]
    stack.ask("PATCH", f"deployments/{watch}", {"paused": paused})


def test_the_scheduler_starts_the_watch_which_starts_a_run_of_a_new_commit_of_a_base(
    stack: Stack, tmp_path: Path
) -> None:
    deploy(stack, tmp_path)
    set_paused(stack, False)
    try:
        started = wait_for(lambda: stack.started_by_watch(stack.sha(BASE)), 180, "a run of the base's commit")
        assert stack.finish(started)["state"]["name"] == "Published"
        stack.hub.upload_file(repo_id=BASE, path_or_fileobj=b"{}", path_in_repo="generation_config.json")
        again = wait_for(lambda: stack.started_by_watch(stack.sha(BASE)), 180, "a run of the new commit")
        assert again != started
        assert stack.finish(again)["state"]["name"] == "Published"
    finally:
        set_paused(stack, True)
    filters = {"deployments": {"name": {"any_": ["watch"]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    completed = stack.ask("POST", "flow_runs/filter", filters)
    assert completed and all(run["auto_scheduled"] for run in completed)
    assert {run["created_by"]["type"] for run in completed} == {"SCHEDULE"}
    assert "Traceback" not in (stack.settings.folder / "log" / "prefect-server.log").read_text()
