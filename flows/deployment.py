"""Put a folder of deployments on a Prefect server: deployments, recipes, work pools and automations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

import requant
from requant.flows.recipes import recipe_files
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.documents import first_problem
from requant.tasks.errors import RecipeError, RequantError

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events.schemas.automations import AutomationCore

POOLS = ("cpu", "gpu")
PREFECT_YAML, RECIPES = "prefect.yaml", "recipes"
EXAMPLE_RECIPE = "qwen3.6-27b-int4.yaml"
OWN_DEPLOYMENTS = Path(requant.__file__).parent / "deployments"


class Schedule(BaseModel):
    """When runs of a deployment start: a cron line, an interval in seconds, or an rrule."""

    model_config = ConfigDict(extra="forbid")
    cron: str | None = None
    interval: float | None = None
    rrule: str | None = None
    timezone: str | None = None
    active: bool = True


class WorkPool(BaseModel):
    """The work pool of a deployment, and its settings for the jobs of runs."""

    model_config = ConfigDict(extra="forbid")
    name: str
    job_variables: dict[str, Any] = {}


class Deployment(BaseModel):
    """A deployment in prefect.yaml. Keys that Prefect knows and this class does not are refused."""

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
        """Import the flow of the entrypoint. Raises RecipeError if there is none."""
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
    """Read a YAML file. Raises RecipeError if that is not possible."""
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): name the folder that has it") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error


def read_deployments(folder: Path, recipes: Path) -> list[Deployment]:
    """Read the deployments of a folder's prefect.yaml, and add one for each recipe of the folder `recipes`.

    A folder without prefect.yaml gets Requant's own deployments. Raises RecipeError.
    """
    path = folder / PREFECT_YAML
    if not path.exists():
        path = OWN_DEPLOYMENTS / PREFECT_YAML
    document = _read(path)
    rows = document.get("deployments") if isinstance(document, dict) else None
    try:
        deployments = [Deployment.model_validate(row) for row in rows] if isinstance(rows, list) else []
    except ValidationError as error:
        raise RecipeError(f"{path}: {_describe(error)}") from error
    if not any(deployment.name == "requantize" for deployment in deployments):
        raise RecipeError(f"{path} has no deployment requantize: write one with `requant deploy --example`")
    return with_recipes(deployments, recipes)


def write_example(folder: Path) -> list[Path]:
    """Write Requant's own prefect.yaml and its reference recipe into a folder. Return the written files.

    Raises RequantError if one of them exists, and then writes none.
    """
    sources = (PREFECT_YAML, f"{RECIPES}/{EXAMPLE_RECIPE}")
    for name in sources:
        if (folder / name).exists():
            raise RequantError(f"{folder / name} exists: name another folder, or delete it first")
    for name in sources:
        write_file(folder, name, [(OWN_DEPLOYMENTS / name).read_bytes()])
    return [folder / name for name in sources]


def read_automations(folder: Path) -> list[AutomationCore]:
    """Read a folder's automations.yaml, if it has one, without retired automations. Raises RecipeError."""
    from prefect.events.schemas.automations import AutomationCore

    from requant.flows.sweep import RETIRED_AUTOMATIONS

    path = folder / "automations.yaml"
    if not path.exists():
        return []
    try:
        automations = TypeAdapter(list[AutomationCore]).validate_python(_read(path))
    except ValidationError as error:
        raise RecipeError(f"{path}: {_describe(error)}") from error
    return [automation for automation in automations if automation.name not in RETIRED_AUTOMATIONS]


def _describe(error: ValidationError) -> str:
    place, problem = first_problem(error)
    return f"{place}: {problem.lower()}"


def with_recipes(deployments: list[Deployment], folder: Path) -> list[Deployment]:
    """Add a deployment of requantize for each recipe of a folder, named after its file, with the recipe as parameter.

    The watch gets the absolute path of the folder, since a worker runs in another working folder. Raises RecipeError if
    there is no such folder, or a recipe is wrong, or two deployments would have one name.
    """
    from requant.tasks.recipe.loader import load_recipe

    recipes = recipe_files(folder)
    watched = {"folder": str(folder.resolve())}
    result = [one.model_copy(update={"parameters": watched}) if one.name == "watch" else one for one in deployments]
    requantize = next(one for one in deployments if one.name == "requantize")
    for path in recipes:
        if path.stem == requantize.name:
            raise RecipeError(f"{path}: the watch starts its runs from the deployment of this name: rename the recipe")
        if path.with_suffix(".yaml") in recipes and path.suffix != ".yaml":
            raise RecipeError(f"{path}: {path.stem}.yaml would have a deployment of the same name: rename the recipe")
        try:
            recipe = load_recipe(path)
        except RecipeError as error:
            raise RecipeError(f"{path.name}: {error}") from error
        changes = {
            "name": path.stem,
            "description": f"{recipe.base.name}: {requantize.description or ''}",
            "parameters": {"recipe": recipe.model_dump(mode="json")},
        }
        result.append(requantize.model_copy(update=changes, deep=True))
    return result


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
    """Create or update a deployment. Return its full name, and whether it was new or different.

    An update deletes the runs that are already scheduled, so it is made only if something is different.
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
        "pull_steps": [],  # The flows are part of the installed package.
    }
    existing: DeploymentResponse | None
    try:
        existing = client.read_deployment_by_name(name)
    except ObjectNotFound:
        existing = None
    schedules = _schedules(wanted, existing)
    if (
        existing is not None
        and _same_schedules(schedules, existing)
        and all(getattr(existing, key) == value for key, value in fields.items())
    ):
        return name, False
    client.create_deployment(
        flow_id=client.create_flow_from_name(flow.name),
        name=wanted.name,
        version=flow.version,
        schedules=schedules,
        paused=existing.paused if existing else False,
        # Each update sends the limit, so that without this one it would be cleared.
        concurrency_limit=existing.concurrency_limit if existing else None,
        **fields,
    )
    return name, True


def _schedules(wanted: Deployment, existing: DeploymentResponse | None) -> list[DeploymentScheduleCreate]:
    """Return the schedules of a deployment.

    A schedule that somebody paused on the server stays paused. A new one is paused if somebody paused all schedules
    that the server has.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import construct_schedule

    before = existing.schedules if existing else []
    all_paused = bool(before) and not any(schedule.active for schedule in before)
    schedules = []
    for document in wanted.schedules:
        try:
            schedule = construct_schedule(**document.model_dump(exclude={"active"}, exclude_none=True))
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RecipeError(
                f"prefect.yaml: deployment {wanted.name} has a schedule that is none ({reason})"
            ) from error
        same = [old.active for old in before if _describe_schedule(old.schedule) == _describe_schedule(schedule)]
        active = same[0] if same else document.active and not all_paused
        schedules.append(DeploymentScheduleCreate(schedule=schedule, active=active))
    return schedules


def _same_schedules(wanted: list[DeploymentScheduleCreate], existing: DeploymentResponse) -> bool:
    """Check whether the server has these schedules, in any order."""
    old, new = (sorted(_describe_schedule(one.schedule) for one in some) for some in (existing.schedules, wanted))
    return old == new


def _describe_schedule(schedule: BaseModel) -> str:
    """Return a schedule as JSON, without the anchor of an interval, which is the time of its creation."""
    return schedule.model_dump_json(exclude={"anchor_date"})


def apply_automations(automations: list[AutomationCore]) -> dict[str, bool]:
    """Create or update automations. Return by name whether each was new or different.

    An update makes an automation forget every event that it has seen, so it is made only if something is different.
    An automation that somebody switched off stays off. Automations of other names are left alone.
    """
    import asyncio

    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import Automation

    async def apply() -> dict[str, bool]:
        changed: dict[str, bool] = {}
        async with get_client() as client:
            for wanted in automations:
                existing: list[Automation] = await client.read_automations_by_name(wanted.name)
                if not existing:
                    await client.create_automation(wanted)
                elif changed_from(existing[0], wanted):
                    wanted.enabled = existing[0].enabled
                    await client.update_automation(existing[0].id, wanted)
                else:
                    changed[wanted.name] = False
                    continue
                changed[wanted.name] = True
        return changed

    return asyncio.run(apply())


def changed_from(existing: AutomationCore, wanted: AutomationCore) -> bool:
    """Check whether an automation differs from the wanted one, other than in the ids of its triggers."""

    def without_ids(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_ids(part) for key, part in value.items() if key != "id"}
        return [without_ids(part) for part in value] if isinstance(value, list) else value

    fields = set(type(wanted).model_fields) - {"enabled"}
    old, new = (one.model_dump(mode="json", include=fields) for one in (existing, wanted))
    return bool(without_ids(old) != without_ids(new))
