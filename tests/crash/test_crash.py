"""SIGKILL of all that a run rests on, in the middle of it: it ends published, once, and little is done again.

CI kills the server and its database. The other kills run at night: a killed run is taken for dead after 90 s without a
heartbeat, and a cancelled run takes more than a minute. In CI, tests/integration kills runs and their quantize children
without workers, and checks what becomes of crashed and cancelled runs on a server without workers.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from infra.dev.stack.__main__ import down, up
from tests.factories.requant import wait_for
from tests.factories.stack import LAYERS, Stack, kill

Recipe = dict[str, Any]
THREE_MINUTES_S = 180.0


def in_the_middle(stack: Stack, recipe: Recipe, block: int = 2) -> str:
    """A new run, that block of which is done."""
    run = stack.start(recipe)
    wait_for(lambda: block in stack.blocks(run), 300, f"block {block}")
    return run


def assert_ended_well(stack: Stack, run: str, recipe: Recipe) -> None:
    ended = stack.finish(run)
    assert ended["state"]["name"] == "Published", ended["state"]["message"]
    assert len(stack.releases(recipe)) == 1
    # The last lines of a process that is ended may not reach the server: the next one says what was finished.
    kept = max(stack.kept_blocks(run), default=0)
    assert set(stack.blocks(run)) | set(range(1, kept + 1)) == set(range(1, LAYERS + 1)), (kept, stack.blocks(run))
    assert len(stack.blocks(run)) <= LAYERS + 1, stack.blocks(run)
    assert stack.unfinished() == []


@pytest.mark.slow
def test_a_killed_quantize_child_goes_on_from_its_last_finished_block(stack: Stack) -> None:
    recipe = stack.recipe()
    run = in_the_middle(stack, recipe)
    child = stack.child()
    assert child is not None
    kill([child])
    assert_ended_well(stack, run, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("service", ["worker-gpu-0", "worker-cpu"])
def test_a_killed_worker_is_started_again_and_its_run_goes_on(stack: Stack, service: str) -> None:
    recipe = stack.recipe()
    run = in_the_middle(stack, recipe)
    kill(stack.tree(service))
    assert_ended_well(stack, run, recipe)


@pytest.mark.parametrize(
    "services",
    [
        ("prefect-server", "postgres"),
        pytest.param(("prefect-server",), marks=pytest.mark.slow),
        pytest.param(("postgres",), marks=pytest.mark.slow),
    ],
    ids=" and ".join,
)
def test_a_killed_server_is_started_again_and_the_run_goes_on(stack: Stack, services: tuple[str, ...]) -> None:
    recipe = stack.recipe()
    run = in_the_middle(stack, recipe)
    kill([process for service in services for process in stack.tree(service)])
    assert_ended_well(stack, run, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "down"])
def test_a_run_goes_on_within_three_minutes_of_the_stack_being_up_again(stack: Stack, how: str) -> None:
    """A power cut, and `make down`: no process is left that could say that the run has ended."""
    recipe = stack.recipe()
    run = in_the_middle(stack, recipe)
    if how == "kill":
        stack.kill_everything()
    else:
        down(stack.settings.folder)
    up(stack.settings.folder, say=lambda text: None)
    began = time.monotonic()
    wait_for(lambda: stack.lives(run) > 1, THREE_MINUTES_S, "the run to go on")
    print(f"{how}: went on {time.monotonic() - began:.0f} s after the stack was up")
    assert_ended_well(stack, run, recipe)


@pytest.mark.slow
def test_a_run_whose_worker_and_server_are_killed_together_goes_on_within_three_minutes(stack: Stack) -> None:
    recipe = stack.recipe()
    run = in_the_middle(stack, recipe)
    kill([*stack.tree("worker-cpu"), *stack.tree("worker-gpu-0"), *stack.tree("prefect-server")])
    wait_for(lambda: stack.ask("GET", "health"), 60, "the server")
    began = time.monotonic()
    wait_for(lambda: stack.lives(run) > 1, THREE_MINUTES_S, "the run to go on")
    print(f"went on {time.monotonic() - began:.0f} s after the server was back")
    assert_ended_well(stack, run, recipe)


@pytest.mark.slow
def test_a_run_that_is_cancelled_after_its_worker_was_killed_does_not_come_back(stack: Stack) -> None:
    """The worker that is started again knows nothing of the run's process, which lives on without it."""
    run = in_the_middle(stack, stack.recipe(iters=1000), block=1)
    worker, *processes = stack.tree("worker-cpu")
    kill([worker])
    stack.ask("POST", f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    began = time.monotonic()
    wait_for(lambda: stack.run(run)["state"]["type"] == "CANCELLED", THREE_MINUTES_S, "the run to be cancelled")
    print(f"cancelled {time.monotonic() - began:.0f} s later")
    wait_for(lambda: stack.child() is None, THREE_MINUTES_S, "the process on the GPU worker to end")
    wait_for(lambda: not stack.unfinished(), THREE_MINUTES_S, "all runs to end")
    wait_for(lambda: not any(map(psutil.Process.is_running, processes)), 60, "the process of the run to end")
    assert stack.state(run) == "Cancelled"
    names = [state["name"] for state in stack.states(run)]
    assert "AwaitingRetry" not in names[names.index("Cancelling") :]


@pytest.mark.slow
def test_a_run_that_waits_for_a_gpu_worker_that_is_not_there_says_so_and_goes_on_with_one(stack: Stack) -> None:
    stack.supervisor.ask("stop", "worker-gpu-0")
    try:
        run = stack.start(stack.recipe(iters=0))
        waiting = wait_for(lambda: next(iter(stack.states_named(run, "WaitingForWorker")), None), 300, "the state")
    finally:
        stack.supervisor.start_service("worker-gpu-0")
    sentence = "no worker of the work pool gpu is online: start one with `requant worker --pool gpu"
    assert sentence in waiting["message"]
    assert [line for line in stack.logs(run) if f"quantize waits: {sentence}" in line]
    assert stack.finish(run)["state"]["name"] == "Published"
    assert len(stack.states_named(run, "WaitingForWorker")) == 1


@pytest.mark.slow
def test_a_store_that_is_away_for_a_minute_is_waited_for(stack: Stack) -> None:
    recipe = stack.recipe()
    run = in_the_middle(stack, recipe)
    with stack.without_s3():
        time.sleep(60)
    assert_ended_well(stack, run, recipe)


@pytest.mark.slow
def test_a_cancelled_run_ends_its_child_and_the_process_on_the_gpu_worker(stack: Stack) -> None:
    run = in_the_middle(stack, stack.recipe(iters=2000), block=1)  # minutes are left, also where cancelling takes one
    (child,) = stack.child_runs(run)
    began = time.monotonic()
    stack.ask("POST", f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    wait_for(lambda: stack.child() is None, 60, "the process to end")
    assert stack.finish(run)["state"]["name"] == stack.finish(child["id"])["state"]["name"] == "Cancelled"
    print(f"cancelled in {time.monotonic() - began:.1f} s")
    assert stack.unfinished() == []


@pytest.mark.slow
def test_two_runs_of_one_recipe_on_two_workers_do_the_work_once(stack: Stack) -> None:
    recipe = stack.recipe()
    second = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu", "--name", "gpu-second", "--limit", "1"],
        env=stack.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        runs = [stack.start(recipe), stack.start(recipe)]
        for run in runs:
            assert stack.finish(run)["state"]["name"] == "Published"
    finally:
        kill([psutil.Process(second.pid)])
        second.wait()
    assert sorted(stack.blocks(runs[0]) + stack.blocks(runs[1])) == list(range(1, LAYERS + 1))
    assert len(stack.releases(recipe)) == 1


@pytest.mark.slow
def test_twenty_runs_wait_for_one_gpu_worker_and_all_finish_one_at_a_time(stack: Stack) -> None:
    recipes = [stack.recipe(iters=0) for _ in range(20)]
    runs = [stack.start(recipe) for recipe in recipes]
    most = 0
    while any(stack.run(run)["state"]["type"] in {"SCHEDULED", "PENDING", "RUNNING"} for run in runs):
        filters = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}, "flows": {"name": {"any_": ["quantize"]}}}
        most = max(most, len(stack.ask("POST", "flow_runs/filter", filters)))
        time.sleep(1)
    assert [stack.state(run) for run in runs] == ["Published"] * 20
    assert most == 1
