"""`requant deploy` on a real Prefect server: what is there already is left alone, and what is paused stays paused."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import PrefectClient, SyncPrefectClient
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings

from requant.flows.sweep import RETIRED_AUTOMATIONS, remove_retired_automations
from tests.factories.paths import ROOT
from tests.factories.requant import Requant

Deploy = Callable[[Path], dict[str, Any]]


def automation(name: str, within: int = 60) -> dict[str, Any]:
    """An automation of the user's own."""
    trigger = {
        "type": "event", "posture": "Proactive", "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "after": ["prefect.flow-run.Failed"], "for_each": ["prefect.resource.id"], "threshold": 1, "within": within,
    }  # fmt: skip
    return {"name": name, "trigger": trigger, "actions": [{"type": "do-nothing"}]}


@pytest.fixture(scope="module")
def server(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with SyncPrefectClient(prefect_server) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "deployments"
    shutil.copytree(ROOT / "deployments", folder)
    (folder / "automations.yaml").write_text(yaml.safe_dump([automation("mine"), automation(RETIRED_AUTOMATIONS[0])]))
    return folder


@pytest.fixture
def deploy(environment: dict[str, str], tmp_path: Path) -> Deploy:
    """`requant deploy FOLDER`: its document."""
    requant = Requant(tmp_path, environment)

    def run(folder: Path) -> dict[str, Any]:
        outcome = requant("deploy", str(folder), "--json")
        assert outcome.status == 0, outcome.stderr
        return outcome.document

    return run


def contents(server: SyncPrefectClient) -> dict[str, Any]:
    """Everything that the server has of deployments, schedules and automations, moments of change included."""
    names = {"requantize": ["requantize", "demo"], "watch": ["watch"], "quantize": ["quantize"], "plan": ["plan"]}
    deployments = {
        f"{flow}/{name}": server.read_deployment_by_name(f"{flow}/{name}").model_dump(exclude={"status", "last_polled"})
        for flow, deployed in names.items()
        for name in deployed
    }
    return {**deployments, "automations": automations(server)}


def automations(server: SyncPrefectClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.request("POST", "/automations/filter", json={}).json()  # type: ignore[arg-type]
    return found


def create_automation(server: SyncPrefectClient, document: dict[str, Any]) -> None:
    async def create() -> None:
        async with PrefectClient(str(server.api_url)) as client:
            await client.create_automation(AutomationCore.model_validate(document))

    asyncio.run(create())


def test_a_second_deploy_touches_nothing_and_one_after_a_change_touches_only_that(
    server: SyncPrefectClient, folder: Path, deploy: Deploy
) -> None:
    create_automation(server, automation("somebody else's"))
    first = deploy(folder)
    assert {"watch/watch", "mine"} <= set(first["changed"])  # another test may have deployed the others
    assert {each["name"] for each in automations(server)} == {"mine", "somebody else's"}
    before = contents(server)

    assert deploy(folder)["changed"] == []
    assert contents(server) == before

    (folder / "automations.yaml").write_text(yaml.safe_dump([automation("mine", within=90)]))
    text = (folder / "prefect.yaml").read_text()
    (folder / "prefect.yaml").write_text(text.replace("*/15 * * * *", "*/20 * * * *"))
    assert deploy(folder)["changed"] == ["watch/watch", "mine"]
    after = contents(server)
    assert {name for name, value in after.items() if value != before[name]} == {"watch/watch", "automations"}


def test_what_somebody_paused_stays_paused_when_the_deployment_changes(
    server: SyncPrefectClient, folder: Path, deploy: Deploy
) -> None:
    deploy(folder)
    watch = server.read_deployment_by_name("watch/watch")
    (schedule,) = watch.schedules
    server.update_deployment_schedule(watch.id, schedule.id, active=False)
    demo = server.read_deployment_by_name("requantize/demo")
    server.pause_deployment(demo.id)

    assert deploy(folder)["changed"] == []
    text = (folder / "prefect.yaml").read_text()
    (folder / "prefect.yaml").write_text(text.replace("description: ", "description: In other words. "))
    assert {"watch/watch", "requantize/demo"} <= set(deploy(folder)["changed"])
    (schedule,) = server.read_deployment_by_name("watch/watch").schedules
    assert not schedule.active
    assert server.read_deployment_by_name("requantize/demo").paused


def test_schedules_and_automations_keep_what_somebody_switched_off(
    server: SyncPrefectClient, folder: Path, deploy: Deploy
) -> None:
    document = yaml.safe_load((folder / "prefect.yaml").read_text())
    (watch,) = (each for each in document["deployments"] if each["name"] == "watch")
    watch["schedules"] = [{"cron": "0 1 * * *"}, {"cron": "0 2 * * *"}]
    (folder / "prefect.yaml").write_text(yaml.safe_dump(document))
    (folder / "automations.yaml").write_text(yaml.safe_dump([automation("mine", within=90)]))
    deploy(folder)
    there = server.read_deployment_by_name("watch/watch")
    for each in there.schedules:
        server.update_deployment_schedule(there.id, each.id, active="0 2" in str(each.schedule))
    (mine,) = (each for each in automations(server) if each["name"] == "mine")
    server.request("PATCH", f"/automations/{mine['id']}", json={"enabled": False})  # type: ignore[arg-type]

    assert deploy(folder)["changed"] == []
    watch["description"] = "In other words."
    (folder / "prefect.yaml").write_text(yaml.safe_dump(document))
    (folder / "automations.yaml").write_text(yaml.safe_dump([automation("mine", within=120)]))
    assert {"watch/watch", "mine"} <= set(deploy(folder)["changed"])
    schedules = server.read_deployment_by_name("watch/watch").schedules
    active = {each.schedule.model_dump()["cron"]: each.active for each in schedules}
    assert active == {"0 1 * * *": False, "0 2 * * *": True}
    (mine,) = (each for each in automations(server) if each["name"] == "mine")
    assert not mine["enabled"] and mine["trigger"]["within"] == 120


def test_a_worker_removes_the_automations_of_earlier_versions_and_no_others(server: SyncPrefectClient) -> None:
    create_automation(server, automation(RETIRED_AUTOMATIONS[1]))
    with temporary_settings({PREFECT_API_URL: str(server.api_url)}):
        remove_retired_automations()
    assert RETIRED_AUTOMATIONS[1] not in {each["name"] for each in automations(server)}
    assert "somebody else's" in {each["name"] for each in automations(server)}


def test_a_pool_without_a_worker_is_said_with_the_command_that_starts_one(
    server: SyncPrefectClient, folder: Path, deploy: Deploy
) -> None:
    notes = deploy(folder)["notes"]
    assert "no worker of the work pool gpu is online: start one with `requant worker --pool gpu" in notes[1]
