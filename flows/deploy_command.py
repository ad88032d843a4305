"""`requant deploy`: what a Prefect server is to know."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import yaml

from flows.command import command
from flows.embedded import check_server
from tasks.errors import RecipeError, RequantError

POOLS = ("cpu", "gpu")


class NotDeployed(RequantError, RuntimeError):
    """Prefect's own command refused."""


@command("deploy")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True), default="deployments")
def deploy(folder: Path) -> tuple[dict[str, Any], str, int]:
    """Put FOLDER (prefect.yaml, recipes/, automations.yaml) on the Prefect server of PREFECT_API_URL.

    Work pools that are missing are made, for processes; those that are there stay as they are.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise RecipeError("PREFECT_API_URL is not set: name the Prefect server, as in http://127.0.0.1:4200/api")
    document = with_recipes(_read(folder / "prefect.yaml"), folder / "recipes")
    automations = _read(folder / "automations.yaml")
    check_server(url)
    from flows.start import server_errors

    with server_errors(), tempfile.TemporaryDirectory() as scratch:
        make_pools()
        path = Path(scratch) / "prefect.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        _prefect("deploy", "--all", "--prefect-file", str(path))
        applied = apply_automations(automations)
    names = [f"{each['entrypoint'].rsplit('.', 1)[-1]}/{each['name']}" for each in document["deployments"]]
    text = "\n".join([*(f"deployment {name}" for name in names), *(f"automation: {name}" for name in applied)])
    return {"deployments": names, "automations": applied}, text, 0


def _read(path: Path) -> Any:
    """A YAML file of the folder. Raises RecipeError."""
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): name the folder that has it") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error


def with_recipes(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """prefect.yaml with one more deployment of requantize for each recipe of a folder: its name, its values filled in.

    Raises RecipeError for a recipe that is wrong, or has the name of a deployment that is there without it.
    """
    from tasks.recipe_file import load_recipe

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


def make_pools() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client:
        for name in POOLS:
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type="process"))
            except ObjectAlreadyExists:
                continue


def apply_automations(documents: list[dict[str, Any]]) -> list[str]:
    """Make the server's automations of these names what the documents say."""
    import asyncio

    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore

    async def apply() -> None:
        async with get_client() as client:
            for document in documents:
                wanted = AutomationCore.model_validate(document)
                there = await client.read_automations_by_name(wanted.name)
                if there:
                    await client.update_automation(there[0].id, wanted)
                else:
                    await client.create_automation(wanted)

    asyncio.run(apply())
    return [document["name"] for document in documents]


def _prefect(*arguments: str) -> None:
    """Run Prefect's own command. Raises NotDeployed with its last lines."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NotDeployed(f"prefect {arguments[0]} failed: {' '.join((done.stdout + done.stderr).split())[-600:]}")
