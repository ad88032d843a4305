"""Measure what a Prefect server and its workers cost over `requant run`: `make bench`.

A stack is started, and the demo recipe runs with few steps: on the server, from the request to the end of the run, and
as the command `requant run`, in turn, ROUNDS times each and with a new seed each time. The base is downloaded and
measured beforehand. Seconds are printed, and the memory of each service, idle and at its peak during runs. Memory is
PSS, in which shared pages count once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from infra.dev.stack.__main__ import down, up
from infra.dev.stack.services import ROOT, Supervisor, services
from infra.dev.stack.settings import Settings
from requant.tasks.recipe.loader import load_recipe

RECIPE = ROOT / "deployments" / "recipes" / "demo.yaml"
ROUNDS = 3


def main() -> None:
    """Measure a new stack, and print and write the figures."""
    with tempfile.TemporaryDirectory() as name:
        settings = up(Path(name) / "stack", say=lambda text: None)
        try:
            figures = measure(settings)
        finally:
            down(settings.folder)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    out = ROOT / "build" / "bench-served.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(figures, indent=1))


def measure(settings: Settings) -> dict[str, Any]:
    """Measure a running stack."""
    run_here(settings, seed=1)
    idle = memory(settings)
    seconds: dict[str, list[float]] = {"requant run": [], "by the server": []}
    peaks_mb: dict[str, int] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(settings, peaks_mb, ended), daemon=True)
    watcher.start()
    for number in range(ROUNDS):
        seconds["requant run"].append(run_here(settings, seed=10 + number))
        seconds["by the server"].append(run_served(settings, seed=20 + number))
    ended.set()
    watcher.join()
    medians = {way: round(statistics.median(times), 1) for way, times in seconds.items()}
    return {
        "seconds": {way: [round(time_s, 1) for time_s in times] for way, times in seconds.items()},
        "medians": medians,
        "overhead_seconds": round(medians["by the server"] - medians["requant run"], 1),
        "memory_mb": {name: {"idle": idle[name], "most": peaks_mb[name]} for name in idle},
    }


def changes(seed: int) -> list[str]:
    """Return changes to the recipe: few steps, and a seed that no other run has."""
    return ["quantize.iters=10", "benchmark.engine=none", "gates.max_perplexity_increase=1", f"quantize.seed={seed}"]


def run_here(settings: Settings, seed: int) -> float:
    """Measure the seconds of `requant run`, with the Hub and the store of the stack."""
    client = {n: v for n, v in settings.client().items() if not n.startswith("PREFECT_")}
    options = [f"--set={change}" for change in changes(seed)]
    began = time.perf_counter()
    command = [sys.executable, "-m", "requant", "run", str(RECIPE), *options, "--json"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **client}, check=False, capture_output=True, text=True)
    assert json.loads(done.stdout)["status"] in {"validated", "published"}, done.stdout[-2000:]
    return time.perf_counter() - began


def run_served(settings: Settings, seed: int) -> float:
    """Measure the seconds from the request for a run of the deployment to its final state."""
    recipe = load_recipe(RECIPE, changes(seed)).model_dump(mode="json")
    with httpx.Client(base_url=f"{settings.ui}/api/", auth=("requant", settings.password), timeout=30) as api:
        deployment = api.get("deployments/name/requantize/requantize").raise_for_status().json()
        began = time.perf_counter()
        body = {"parameters": {"recipe": recipe}}
        run = api.post(f"deployments/{deployment['id']}/create_flow_run", json=body).raise_for_status().json()
        while True:
            state = api.get(f"flow_runs/{run['id']}").raise_for_status().json()["state"]
            if state["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
                break
            time.sleep(0.1)
    assert state["type"] == "COMPLETED", state
    return time.perf_counter() - began


def memory(settings: Settings) -> dict[str, int]:
    """Measure the memory of each service and of the processes below it, without those of runs, in MB."""
    supervisor = Supervisor(settings)
    used_mb = {}
    for service in services(settings):
        process = psutil.Process(supervisor.pid(service.name))
        below = [] if service.name.startswith("worker") else process.children(recursive=True)
        used_mb[service.name] = round(sum(p.memory_full_info().pss for p in (process, *below)) / 1e6)
    return used_mb


def watch_memory(settings: Settings, peaks_mb: dict[str, int], ended: threading.Event) -> None:
    """Update the peaks once a second, until `ended` is set."""
    while not ended.wait(1.0):
        try:
            now = memory(settings)
        except psutil.Error:  # a process of a service has just ended
            continue
        for name, megabytes in now.items():
            peaks_mb[name] = max(peaks_mb.get(name, 0), megabytes)


if __name__ == "__main__":
    main()
