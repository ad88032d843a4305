"""A run whose process was killed lives again: what its first life left behind on a real Prefect server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.factories.paths import ROOT
from tests.factories.requant import wait_for

PROGRAM = """
import os, signal, sys, time
from prefect import flow, runtime, task
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled
from tasks.prefect_stage import end_earlier_tasks

@task(name="stage")
def stage():
    print(runtime.flow_run.id, flush=True)
    time.sleep(600 if runtime.flow_run.run_count == 1 else 0)

@flow(persist_result=False)
def lives():
    end_earlier_tasks()
    stage()

if sys.argv[1:]:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(sys.argv[1], Scheduled(), force=True)
        run = client.read_flow_run(sys.argv[1])
    run_flow(lives, flow_run=run)
else:
    lives()
"""


def test_a_task_that_was_killed_with_its_run_is_not_left_running(prefect_server: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    environment = {**os.environ, "PREFECT_API_URL": prefect_server, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    run = first.stdout.readline().strip()
    wait_for(lambda: states(prefect_server, run) == ["Running"], 60, 0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    subprocess.run([*command, run], env=environment, check=True, timeout=120)
    wait_for(lambda: states(prefect_server, run) == ["Completed", "Crashed"], 60, 0.2)


def states(server: str, run: str) -> list[str]:
    body: dict[str, Any] = {"flow_runs": {"id": {"any_": [run]}}}
    found = httpx.post(f"{server}/task_runs/filter", json=body).raise_for_status().json()
    return sorted(task["state_name"] for task in found)
