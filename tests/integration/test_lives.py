"""A run whose process was killed lives again: what its first life left behind on a real Prefect server."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx

from tests.factories.forked import forked
from tests.factories.requant import finish, wait_for

PROGRAM = """
import sys, time
from prefect import flow, runtime, task
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled
from requant.tasks.pipeline.prefect import crash_stale_task_runs

@task(name="stage")
def stage():
    with open(sys.argv[1], "w") as told:
        told.write(str(runtime.flow_run.id))
    time.sleep(600 if runtime.flow_run.run_count == 1 else 0)

@flow(persist_result=False)
def lives():
    crash_stale_task_runs()
    stage()

if sys.argv[2:]:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(sys.argv[2], Scheduled(), force=True)
        run = client.read_flow_run(sys.argv[2])
    run_flow(lives, flow_run=run)
else:
    lives()
"""


def test_a_task_that_was_killed_with_its_run_is_not_left_running(
    prefect_server: str, environment: dict[str, str], tmp_path: Path
) -> None:
    told = tmp_path / "run"
    first = forked(["-c", PROGRAM, str(told)], environment)
    run = wait_for(lambda: told.exists() and told.read_text(), pause=0.05)
    wait_for(lambda: states(prefect_server, run) == ["Running"], pause=0.05)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    again = finish(forked(["-c", PROGRAM, str(told), run], environment))
    assert again.status == 0, again.stderr
    wait_for(lambda: states(prefect_server, run) == ["Completed", "Crashed"], pause=0.05)


def states(server: str, run: str) -> list[str]:
    body: dict[str, Any] = {"flow_runs": {"id": {"any_": [run]}}}
    found = httpx.post(f"{server}/task_runs/filter", json=body).raise_for_status().json()
    return sorted(task["state_name"] for task in found)
