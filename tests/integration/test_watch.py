"""New commits become runs: watch and webhook against a real Prefect server, the Hub stand-in, and a real run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from infra.dev.hub.launch import HubStandIn
from requant.tasks.recipe.loader import parse_recipe
from tests.factories.forked import forked
from tests.factories.paths import ROOT
from tests.factories.requant import BUILTIN_TEXT, Outcome, Requant, finish, recipe_for, stop, store_in, wait_for
from tests.factories.webhook import payload

BASE = "demo/watched"
SECRET = "a-secret-of-the-webhook"
PAYLOAD, UNKNOWN = payload(repo={"name": BASE}), payload(repo={"name": "somebody/else"})


@pytest.fixture(scope="module")
def deployment(
    environment: dict[str, str], finished: tuple[Requant, Outcome], tmp_path_factory: pytest.TempPathFactory
) -> Requant:
    """The deployment that watches start runs of, on a pool without a worker: runs wait to be looked at.

    Its store has the stages of the finished run, so that a run of the same weights reuses them.
    """
    folder = tmp_path_factory.mktemp("watch")
    shutil.copytree(finished[0].store, folder / "store", copy_function=os.link)
    requant = Requant(folder, {**environment, **store_in(folder)})
    deployed = requant("deploy", str(ROOT / "deployments"))
    assert deployed.status == 0, deployed.stderr
    return requant


@dataclass
class Relay:
    """The webhook relay in a process of its own."""

    client: httpx.Client
    log: Path

    def settle(self) -> None:
        """Wait until all earlier payloads are handled: a pass that checks no recipe saw only our marker payload."""
        while True:
            before = len(self.passes())
            assert self.client.post("/hub", json=UNKNOWN).json() == {"status": "accepted"}
            wait_for(lambda: len(self.passes()) > before)  # noqa: B023
            if "0" in self.passes()[before:]:
                return

    def passes(self) -> list[str]:
        """How many recipes each pass has checked."""
        return re.findall(r"(\d+) checked, \d+ started, \d+ problems", self.log.read_text())


@pytest.fixture(scope="module")
def relay(deployment: Requant) -> Iterator[Relay]:
    """The webhook relay, as a process, over a recipe of the watched base."""
    write_recipe(deployment, "watched.yaml", recipe_for(BASE, None, BUILTIN_TEXT))
    recipes = deployment.folder / "recipes"
    environment = {**deployment.environment, "REQUANT_WEBHOOK_SECRET": SECRET}
    command = [sys.executable, "-m", "requant", "webhook", "--recipes", str(recipes), "--port", "0"]
    log = deployment.folder / "relay.log"
    with log.open("wb") as out:  # no fork: its log would be what another import has made of logging
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        ready = r"running on (http://127\.0\.0\.1:\d+)"
        (url,) = wait_for(lambda: re.findall(ready, log.read_text()))
        with httpx.Client(base_url=url, headers={"X-Webhook-Secret": SECRET}) as client:
            yield Relay(client, log)
    finally:
        stop(process)
    assert SECRET not in log.read_text()


@pytest.fixture(scope="module")
def base_folder(base: Path, hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "base"
    shutil.copytree(base, folder)
    hub.seed(BASE, folder)
    return folder


@pytest.fixture(scope="module")
def beside(deployment: Requant, base_folder: Path, hub: HubStandIn) -> tuple[Requant, Outcome]:
    """A pass over a recipe whose base is gone, one that is wrong, and one that is good."""
    hub.seed("demo/beside", base_folder)
    requant = Requant(deployment.folder / "beside", deployment.environment)
    write_recipe(requant, "a-gone.yaml", recipe_for("demo/gone", None))
    write_recipe(requant, "b-wrong.yaml", {"base": {"repo_id": "demo/beside"}, "quantise": {}})
    write_recipe(requant, "c-good.yaml", recipe_for("demo/beside", None))
    return requant, watch(requant)


def write_recipe(requant: Requant, name: str, recipe: dict[str, Any]) -> None:
    folder = requant.folder / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(recipe))


def watch(requant: Requant, *, new_process: bool = False) -> Outcome:
    folder = str(requant.folder / "recipes")
    return requant("watch", "--once", "--recipes", folder, "--json", new_process=new_process)


def runs(api: str, base: str = BASE) -> list[dict[str, Any]]:
    """The runs that watches and the relay started for commits of a base."""
    body = {"flow_runs": {"tags": {"all_": ["watch"]}}, "sort": "START_TIME_ASC", "limit": 200}
    found: list[dict[str, Any]] = httpx.post(f"{api}/flow_runs/filter", json=body).raise_for_status().json()
    return [run for run in found if str(run["idempotency_key"]).startswith(f"{base}@")]


def end(api: str, run: dict[str, Any], state: str) -> None:
    body = {"state": {"type": state, "message": "as the test says"}, "force": True}
    httpx.post(f"{api}/flow_runs/{run['id']}/set_state", json=body).raise_for_status()


def ask_all_at_once(requant: Requant, relay: Relay) -> None:
    """Three watches and twenty payloads, together."""
    folder = str(requant.folder / "recipes")
    watches = [requant.fork("watch", "--once", "--recipes", folder, "--json") for _ in range(3)]
    with ThreadPoolExecutor(10) as pool:
        for answer in pool.map(lambda _: relay.client.post("/hub", json=PAYLOAD), range(20)):
            assert (answer.status_code, answer.json()) == (202, {"status": "accepted"})
    for process in watches:
        outcome = finish(process)
        assert outcome.status == 0, outcome.stderr
        assert outcome.document["checked"] == 1
    relay.settle()


def test_a_commit_is_run_once_a_readme_not_at_all_and_a_changed_shard_once_more(
    deployment: Requant, relay: Relay, base_folder: Path, hub: HubStandIn, prefect_server: str
) -> None:
    sha = hub.seed(BASE, base_folder)
    ask_all_at_once(deployment, relay)
    (first,) = runs(prefect_server)
    assert first["idempotency_key"] == f"{BASE}@{sha}:{parse_recipe(first['parameters']['recipe']).digest}"

    (base_folder / "README.md").write_text("---\nlicense: mit\n---\nnew words, while the run waits\n")
    hub.seed(BASE, base_folder)
    ask_all_at_once(deployment, relay)
    assert len(runs(prefect_server)) == 1

    done = deployment("run", str(deployment.folder / "recipes" / "watched.yaml"), "--json")
    assert done.status == 0, done.stderr
    assert done.states["quantize"] == "reused"
    end(prefect_server, first, "COMPLETED")  # as the worker would have ended it after the same work
    (base_folder / "README.md").write_text("---\nlicense: mit\n---\nnew words, after the run\n")
    hub.seed(BASE, base_folder)
    ask_all_at_once(deployment, relay)
    assert len(runs(prefect_server)) == 1

    shard = next(base_folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    sha = hub.seed(BASE, base_folder)
    ask_all_at_once(deployment, relay)
    keys = [run["idempotency_key"] for run in runs(prefect_server)]
    assert len(keys) == 2 and any(key.startswith(f"{BASE}@{sha}:") for key in keys)


def test_a_run_that_was_cancelled_or_failed_just_now_is_left_alone(
    deployment: Requant, base_folder: Path, hub: HubStandIn, prefect_server: str
) -> None:
    hub.seed("demo/ended", base_folder)
    requant = Requant(deployment.folder / "ended", deployment.environment)
    write_recipe(requant, "ended.yaml", recipe_for("demo/ended", None))
    assert [each["status"] for each in watch(requant).document["started"]] == ["scheduled"]
    (waiting,) = runs(prefect_server, "demo/ended")
    for state in ("FAILED", "CANCELLED"):
        end(prefect_server, waiting, state)
        outcome = watch(requant)
        assert outcome.status == 0 and outcome.document == {"checked": 1, "started": [], "problems": []}
    assert len(runs(prefect_server, "demo/ended")) == 1


def test_a_base_that_is_gone_and_a_recipe_that_is_wrong_stop_no_other(
    beside: tuple[Requant, Outcome], prefect_server: str
) -> None:
    _, outcome = beside
    assert outcome.status == 1
    assert outcome.document["checked"] == 3
    (started,) = outcome.document["started"]
    assert (started["recipe"], started["status"]) == ("c-good.yaml", "scheduled")
    assert [run["id"] for run in runs(prefect_server, "demo/beside")] == [started["run"]]
    errors = {problem["recipe"]: problem["error"] for problem in outcome.document["problems"]}
    assert "demo/gone does not exist" in errors["a-gone.yaml"] and "did you mean quantize?" in errors["b-wrong.yaml"]


def test_the_flow_ends_in_a_state_that_says_so_and_has_a_table_of_what_it_did(
    beside: tuple[Requant, Outcome], prefect_server: str
) -> None:
    """Of three recipes one has started already, two have problems."""
    requant, _ = beside
    code = "import sys; from requant.flows.watch import watch; print(watch(sys.argv[1], return_state=True).name)"
    done = finish(forked(["-c", code, str(requant.folder / "recipes")], requant.environment))
    assert done.stdout.split()[-1] == "Problems", done.stderr
    body = {"artifacts": {"key": {"any_": ["requant-watch"]}}}
    (table,) = httpx.post(f"{prefect_server}/artifacts/filter", json=body).raise_for_status().json()
    assert "demo/gone" in table["data"] and "c-good" not in table["data"]


def test_a_pass_that_cannot_be_made_ends_the_flow_with_a_sentence(deployment: Requant) -> None:
    code = "from requant.flows.watch import watch; print(watch('/nowhere', return_state=True).message)"
    done = finish(forked(["-c", code], deployment.environment))
    assert done.stdout.strip() == "the folder /nowhere does not exist: name a folder of recipes with --recipes"
    assert "Traceback" not in done.stderr


def test_unknown_repos_and_other_events_start_nothing(relay: Relay, hub: HubStandIn, prefect_server: str) -> None:
    before = len(runs(prefect_server))
    hub.reset_traffic()
    comment = payload(repo={"name": BASE}, event={"action": "create", "scope": "discussion.comment"})
    assert relay.client.post("/hub", json=comment).json() == {"status": "ignored"}
    relay.settle()  # which sends the name of a repo that nobody watches
    assert len(runs(prefect_server)) == before and hub.traffic() == []


def test_without_a_server_what_is_due_is_run_here_and_then_no_more(requant: Requant) -> None:
    """The store has the stages of the finished run; the runs themselves are new, since their recipes are."""
    here = Requant(requant.folder, {**requant.environment})
    del here.environment["PREFECT_API_URL"]
    recipe = recipe_for("demo/pico", None, BUILTIN_TEXT)
    write_recipe(here, "here.yaml", recipe)
    write_recipe(here, "strict.yaml", {**recipe, "gates": {"min_mtp_acceptance_ratio": 9.0}})
    first, second = watch(here, new_process=True), watch(here, new_process=True)
    assert first.status == 1, first.stderr  # since one is rejected
    started = [(each["recipe"], each["status"], each["run"]) for each in first.document["started"]]
    assert started == [("here.yaml", "validated", None), ("strict.yaml", "rejected", None)]
    assert (second.status, second.document) == (
        0, {"checked": 2, "started": [], "problems": [], "rejected": ["strict.yaml"]},
    )  # fmt: skip


def test_a_server_that_does_not_answer_is_a_sentence(
    deployment: Requant, hub: HubStandIn, base_folder: Path, tmp_path: Path
) -> None:
    gone = deployment.variant(PREFECT_API_URL="http://127.0.0.1:9/api")
    gone.folder = tmp_path
    hub.seed("demo/here", base_folder)
    write_recipe(gone, "here.yaml", recipe_for("demo/here", None))
    outcome = watch(gone, new_process=True)
    assert outcome.status == 1 and "PREFECT_API_URL" in outcome.stderr and "Traceback" not in outcome.stderr
