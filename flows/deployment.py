"""What a Prefect server must know of a folder of deployments: flows, recipes, work pools, automations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from requant.tasks.errors import RecipeError

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events.schemas.automations import AutomationCore

POOLS = ("cpu", "gpu")


class Schedule(BaseModel):
    """When runs of a deployment start: a cron line, an interval in seconds, or an rrule."""

    model_config = ConfigDict(extra="forbid")
    cron: str | None = None
    interval: float | None = None
    rrule: str | None = None
    timezone: str | None = None
    active: bool = True


class WorkPool(BaseModel):
    """The work pool of a deployment, and what its runs are started with."""

    model_config = ConfigDict(extra="forbid")
    name: str
    job_variables: dict[str, Any] = {}


class Deployment(BaseModel):
    """A deployment as prefect.yaml describes it. Keys of Prefect's that this command does not know are refused."""

    model_config = ConfigDict(extra="forbid")
    name: str
    entrypoint: str
    description: str | None = None
    tags: list[str] = []
    parameters: dict[str, Any] = {}
    enforce_parameter_schema: bool = True
    work_pool: WorkPool
    schedules: list[Schedule] = []

    def flow(self) -> Flow[..., Any]:
        """Import the flow of the entrypoint. Raises RecipeError."""
        from prefect import Flow
        from prefect.exceptions import ScriptError
        from prefect.utilities.importtools import import_object

        try:
            flow = import_object(self.entrypoint)
        except (ImportError, AttributeError, ValueError, ScriptError) as error:
            raise RecipeError(f"prefect.yaml: entrypoint {self.entrypoint} cannot be imported ({error})") from error
        if not isinstance(flow, Flow):
            raise RecipeError(f"prefect.yaml: entrypoint {self.entrypoint} is no flow: name one as in module.flow")
        return flow


def _read(path: Path) -> Any:
    """A YAML file of the folder. Raises RecipeError."""
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): name the folder that has it") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error


def read_deployments(folder: Path) -> list[Deployment]:
    """The deployments of a folder's prefect.yaml, and one for each of its recipes. Raises RecipeError."""
    path = folder / "prefect.yaml"
    document = _read(path)
    try:
        return [Deployment.model_validate(each) for each in with_recipes(document, folder / "recipes")["deployments"]]
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_problem(error)}") from error
    except (KeyError, TypeError, StopIteration) as error:
        raise RecipeError(f"{path} has no deployment requantize: start from the one of the project") from error


def read_automations(folder: Path) -> list[AutomationCore]:
    """The automations of a folder's automations.yaml, if it has one, without those retired. Raises RecipeError."""
    from prefect.events.schemas.automations import AutomationCore

    from requant.flows.sweep import RETIRED_AUTOMATIONS

    path = folder / "automations.yaml"
    if not path.exists():
        return []
    try:
        found = TypeAdapter(list[AutomationCore]).validate_python(_read(path))
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_problem(error)}") from error
    return [automation for automation in found if automation.name not in RETIRED_AUTOMATIONS]


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}"


def with_recipes(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """prefect.yaml with one more deployment of requantize for each recipe of a folder: its name, its values filled in.

    Raises RecipeError for a recipe that is wrong, or has the name of a deployment that is there without it.
    """
    from requant.tasks.recipe.loader import load_recipe

    whole = next(each for each in document["deployments"] if each["name"] == "requantize")
    for each in document["deployments"]:
        if each["name"] == "watch":
            each["parameters"] = {"folder": str(folder.resolve())}  # a worker does not run where this command does
    for path in sorted(folder.glob("*.yaml")):
        if path.stem == whole["name"]:
            raise RecipeError(f"{path}: the watch starts its runs from the deployment of this name: rename the recipe")
        try:
            recipe = load_recipe(path)
        except RecipeError as error:
            raise RecipeError(f"{path.name}: {error}") from error
        named = copy.deepcopy(whole)
        named["name"] = path.stem
        named["description"] = f"{recipe.base.repo_id}: {whole['description']}"
        named["parameters"] = {"recipe": recipe.model_dump(mode="json")}
        document["deployments"].append(named)
    return document


def make_pools(client: SyncPrefectClient) -> None:
    """Create the work pools that are missing."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    for name in POOLS:
        try:
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        except ObjectAlreadyExists:
            continue


def apply_deployment(client: SyncPrefectClient, wanted: Deployment) -> tuple[str, bool]:
    """Make one deployment of the server what is wanted. Return its full name, and whether it was new or different.

    An update would delete the runs that are scheduled already, so it is made only where it changes something.
    """
    from prefect.exceptions import ObjectNotFound
    from prefect.utilities.callables import parameter_schema

    flow = wanted.flow()
    name = f"{flow.name}/{wanted.name}"
    fields = {
        **wanted.model_dump(include={"entrypoint", "description", "tags", "parameters", "enforce_parameter_schema"}),
        "work_pool_name": wanted.work_pool.name,
        "job_variables": wanted.work_pool.job_variables,
        "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
        "pull_steps": [],  # the flows are part of the installed package
    }
    there: DeploymentResponse | None
    try:
        there = client.read_deployment_by_name(name)
    except ObjectNotFound:
        there = None
    schedules = _schedules(wanted, there)
    if (
        there is not None
        and _same_schedules(schedules, there)
        and all(getattr(there, key) == value for key, value in fields.items())
    ):
        return name, False
    client.create_deployment(
        flow_id=client.create_flow_from_name(flow.name),
        name=wanted.name,
        version=flow.version,
        schedules=schedules,
        paused=there.paused if there else False,
        concurrency_limit=there.concurrency_limit if there else None,  # Each update sends it, and none would clear it.
        **fields,
    )
    return name, True


def _schedules(wanted: Deployment, there: DeploymentResponse | None) -> list[DeploymentScheduleCreate]:
    """The schedules of a deployment. One that somebody paused on the server stays paused; a new one is paused if
    somebody paused all that the server has."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import construct_schedule

    before = there.schedules if there else []
    all_paused = bool(before) and not any(each.active for each in before)
    schedules = []
    for document in wanted.schedules:
        try:
            schedule = construct_schedule(**document.model_dump(exclude={"active"}, exclude_none=True))
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RecipeError(
                f"prefect.yaml: deployment {wanted.name} has a schedule that is none ({reason})"
            ) from error
        same = [each.active for each in before if _describe_schedule(each.schedule) == _describe_schedule(schedule)]
        active = same[0] if same else document.active and not all_paused
        schedules.append(DeploymentScheduleCreate(schedule=schedule, active=active))
    return schedules


def _same_schedules(wanted: list[DeploymentScheduleCreate], there: DeploymentResponse) -> bool:
    """Whether the server has these schedules, which it returns in an order of its own."""
    return sorted(_describe_schedule(each.schedule) for each in wanted) == sorted(
        _describe_schedule(each.schedule) for each in there.schedules
    )


def _describe_schedule(schedule: BaseModel) -> str:
    """A schedule in words. The anchor of an interval is the moment of its creation: it differs each time."""
    return schedule.model_dump_json(exclude={"anchor_date"})


def apply_automations(automations: list[AutomationCore]) -> dict[str, bool]:
    """Make the server's automations of these names what is wanted; True for those that were new or different.

    An update makes an automation forget every event that it has seen, so it is made only where it changes something.
    One that somebody switched off stays so. All others are left alone.
    """
    import asyncio

    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import Automation

    async def apply() -> dict[str, bool]:
        changed: dict[str, bool] = {}
        async with get_client() as client:
            for wanted in automations:
                there: list[Automation] = await client.read_automations_by_name(wanted.name)
                if not there:
                    await client.create_automation(wanted)
                elif changed_from(there[0], wanted):
                    wanted.enabled = there[0].enabled
                    await client.update_automation(there[0].id, wanted)
                else:
                    changed[wanted.name] = False
                    continue
                changed[wanted.name] = True
        return changed

    return asyncio.run(apply())


def changed_from(there: AutomationCore, wanted: AutomationCore) -> bool:
    """Whether an automation differs from what is wanted, whatever ids its triggers were given."""

    def without_ids(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_ids(each) for key, each in value.items() if key != "id"}
        return [without_ids(each) for each in value] if isinstance(value, list) else value

    fields = set(type(wanted).model_fields) - {"enabled"}
    ours, theirs = (each.model_dump(mode="json", include=fields) for each in (wanted, there))
    return bool(without_ids(ours) != without_ids(theirs))
