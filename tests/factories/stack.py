"""A stack (infra.dev.stack) that tests start, look into and break: runs by Prefect's HTTP API, processes by service."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from huggingface_hub import HfApi

from infra.dev.stack import postgres
from infra.dev.stack.__main__ import CEPH, down, up
from infra.dev.stack.services import Supervisor, services
from infra.dev.stack.settings import Settings
from tests.factories.pico import pico_base
from tests.factories.quantizing import children
from tests.factories.requant import wait_for

ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
LAYERS = 4
BASE = "me/pico-base"
WAIT = 600.0  # seconds: two minutes without a heartbeat, and a loaded machine


@dataclass
class Stack:
    settings: Settings
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 10_000)))

    @property
    def hub(self) -> HfApi:
        client = self.settings.client()
        return HfApi(endpoint=client["HF_ENDPOINT"], token=client["HF_TOKEN"])

    @property
    def supervisor(self) -> Supervisor:
        return Supervisor(self.settings)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One call to Prefect's API; a server that is just starting again is waited for."""
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = httpx.request(
                    method,
                    f"{self.settings.ui}/api/{path}",
                    json=body,
                    auth=("requant", self.settings.password),
                    timeout=30,
                )
                answer.raise_for_status()
                return answer.json() if answer.content else None
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    # Runs

    def recipe(self, **quantize: Any) -> dict[str, Any]:
        """A recipe that no other run shares, published to a repo of its own. Random weights pass no quality gate."""
        number = next(self.numbers)
        tuning = {"iters": 150, "nsamples": 8, "seqlen": 64, "batch_size": 8, "group_size": 32, "seed": number}
        quality = ("max_perplexity_increase", "max_kl_divergence", "min_top1_agreement", "min_mtp_acceptance_ratio")
        return {
            "base": {"repo_id": BASE},
            "quantize": {**tuning, "calibration": "builtin:python", **quantize},
            "validation": {"text": "builtin:python-evaluation"},
            "gates": dict.fromkeys(quality),
            "benchmark": {"engine": "none"},
            "publish": {"repo_id": f"me/pico-{number}"},
        }

    def start(self, recipe: dict[str, Any]) -> str:
        deployment = self.ask("GET", "deployments/name/requantize/requantize")
        body = {"parameters": {"recipe": recipe}}
        return str(self.ask("POST", f"deployments/{deployment['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        run: dict[str, Any] = self.ask("GET", f"flow_runs/{run_id}")
        return run

    def child_runs(self, run_id: str) -> list[dict[str, Any]]:
        filters = {"flow_runs": {"parent_flow_run_id": {"any_": [run_id]}}}
        runs: list[dict[str, Any]] = self.ask("POST", "flow_runs/filter", filters)
        return runs

    def state(self, run_id: str) -> str:
        return str(self.run(run_id)["state"]["name"])

    def finish(self, run_id: str, seconds: float = WAIT) -> dict[str, Any]:
        """Wait for the run's last state; a crashed one goes on."""
        return wait_for(lambda: _ended(self.run(run_id)), seconds, f"run {run_id} to end")

    def states(self, run_id: str) -> list[dict[str, Any]]:
        """All states of a run, in order."""
        states: list[dict[str, Any]] = self.ask("GET", f"flow_run_states/?flow_run_id={run_id}")
        return sorted(states, key=lambda state: str(state["timestamp"]))

    def states_named(self, run_id: str, name: str) -> list[dict[str, Any]]:
        return [state for state in self.states(run_id) if state["name"] == name]

    def lives(self, run_id: str) -> int:
        """How often a run was begun: each time it was scheduled before."""
        kinds = [state["type"] for state in self.states(run_id)]
        return sum(before != "RUNNING" and now == "RUNNING" for before, now in itertools.pairwise(kinds))

    def logs(self, run_id: str) -> list[str]:
        filters = {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return [line["message"] for line in self.ask("POST", "logs/filter", filters)]

    def blocks(self, run_id: str) -> list[int]:
        """The blocks that the run's quantize child reported finished, in order, also twice."""
        lines = [line for child in self.child_runs(run_id) for line in self.logs(child["id"])]
        return [int(found[1]) for line in lines if (found := re.match(r"block (\d+) of \d+:", line))]

    def kept_blocks(self, run_id: str) -> list[int]:
        """How many blocks were finished each time when the run's quantize child went on."""
        lines = [line for child in self.child_runs(run_id) for line in self.logs(child["id"])]
        return [int(found[1]) for line in lines if (found := re.match(r"going on after (\d+) finished blocks", line))]

    def unfinished(self) -> list[str]:
        filters = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "SCHEDULED", "CANCELLING"]}}}}
        runs = self.ask("POST", "flow_runs/filter", filters)
        return [f"{run['name']}: {run['state']['name']}" for run in runs if not run["auto_scheduled"]]

    def sha(self, repo_id: str) -> str:
        """The newest commit of a repo."""
        return str(self.hub.model_info(repo_id).sha)

    def read(self, repo_id: str, path: str) -> str:
        """A file of the newest commit."""
        return Path(self.hub.hf_hub_download(repo_id, path, local_dir=self.settings.folder / "read")).read_text()

    def write(self, repo_id: str, path: str, text: str) -> None:
        """Commit a file."""
        self.hub.upload_file(repo_id=repo_id, path_in_repo=path, path_or_fileobj=text.encode())

    def started_by_watch(self, sha: str) -> str | None:
        """The run that a watch started for a commit of a base."""
        runs = self.ask("POST", "flow_runs/filter", {"flow_runs": {"tags": {"all_": ["watch"]}}})
        return next((run["id"] for run in runs if f"@{sha}:" in str(run["idempotency_key"])), None)

    def releases(self, recipe: dict[str, Any]) -> list[str]:
        """The commits that published this recipe's result."""
        commits = self.hub.list_repo_commits(recipe["publish"]["repo_id"])
        return [commit.title for commit in commits if commit.title.startswith("Requant of")]

    # Processes

    def tree(self, service: str) -> list[psutil.Process]:
        """A service's process and all below it."""
        process = psutil.Process(self.supervisor.pid(service))
        return [process, *process.children(recursive=True)]

    def kill_everything(self) -> None:
        """What a power cut leaves: no process of this stack, and files as they are at this moment."""
        supervisor = psutil.Process(int(self.supervisor.ask("pid").stdout))
        ours = [supervisor, *supervisor.children(recursive=True)]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(str(self.settings.folder) in word for word in process.cmdline()) and process not in ours:
                    ours.append(process)
        kill([process for process in ours if process.pid != os.getpid()])

    def child(self) -> psutil.Process | None:
        """The process that runs auto-round."""
        return next(iter(children(self.settings.folder)), None)

    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.settings.client()}

    @contextmanager
    def without_s3(self) -> Iterator[None]:
        """Nothing answers where the S3 server was."""
        folder = self.settings.folder / "s3"
        port = re.search(r"AWS_ENDPOINT_URL_S3=\S*:(\d+)", (folder / "env").read_text())
        assert port
        subprocess.run([CEPH, "down", str(folder)], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run([CEPH, "up", str(folder), "--port", port[1]], check=True, capture_output=True)


@contextmanager
def running_stack(folder: Path) -> Iterator[Stack]:
    """A stack with a pico base on its Hub."""
    try:
        stack = Stack(up(folder, say=lambda text: None))
        pico_base(folder / "base", layers=LAYERS)
        watch = stack.ask("GET", "deployments/name/watch/watch")["id"]
        stack.ask("PATCH", f"deployments/{watch}", {"paused": True})  # its runs are no part of what tests count
        stack.hub.create_repo(BASE)
        stack.hub.upload_folder(repo_id=BASE, folder_path=folder / "base")
        yield stack
    finally:
        down(folder)
    settings = Settings.of(folder)
    left = [service.name for service in services(settings) if _there(settings, service.command)]
    assert not left, f"make down left {left} running"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack for all tests of the session. Without Ceph or PostgreSQL, the tests that need it are skipped."""
    if os.geteuid() != 0:  # root installs what is missing
        try:
            postgres.install()
            subprocess.run([CEPH, "install"], check=True, capture_output=True, text=True)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            pytest.skip((getattr(error, "stderr", None) or str(error)).strip())
    with running_stack(tmp_path_factory.mktemp("stack") / "stack") as started:
        yield started


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, all at once."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


def _ended(run: dict[str, Any]) -> dict[str, Any] | None:
    state = run["state"]["type"]
    return run if state in ENDED - {"CRASHED"} else None


def _there(settings: Settings, command: Sequence[str]) -> bool:
    for process in psutil.process_iter():
        try:
            if process.cmdline()[-len(command) :] == list(command):
                return True
        except psutil.Error:
            continue
    return False
