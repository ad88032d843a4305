"""`requant deploy`: put deployments, recipes and work pools on a Prefect server."""

from __future__ import annotations

from pathlib import Path

import click

from requant.flows.cli.arguments import server_url
from requant.flows.cli.command import EXISTING_FOLDER, CommandResult, command
from requant.flows.recipes import default_recipes

DEFAULT_FOLDER = Path("deployments")


@command("deploy")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option(
    "--recipes",
    type=EXISTING_FOLDER,
    metavar="FOLDER",
    help="Take the recipes of this folder, one YAML file per recipe, instead of FOLDER/recipes.",
)
@click.option("--example", is_flag=True, help="Write a prefect.yaml and a recipe into FOLDER, and deploy nothing.")
def deploy(folder: Path | None, recipes: Path | None, example: bool) -> CommandResult:
    """Put deployments, recipes and work pools on a Prefect server.

    PREFECT_API_URL names the server. FOLDER (default: deployments) holds recipes/ and, if they are needed, prefect.yaml
    and automations.yaml. Without a prefect.yaml, Requant's own deployments are used. What the server already has in the
    same form is left alone, and what somebody paused stays paused. Missing work pools are created, of the type process.

    \b
    Examples:
      requant deploy --recipes recipes
      PREFECT_API_URL=http://prefect:4200/api requant deploy deployments
      requant deploy --example deployments
    """
    from requant.flows.cli.documents import DeployDocument
    from requant.flows.deployment import (
        POOLS,
        RECIPES,
        apply_automations,
        apply_deployment,
        make_pools,
        read_automations,
        read_deployments,
        write_example,
    )
    from requant.flows.embedded import check_server

    if example:
        written = [str(path) for path in write_example(folder or DEFAULT_FOLDER)]
        text = "\n".join(f"wrote {path}" for path in written)
        return CommandResult(DeployDocument(written=written).to_json(), text)
    url = server_url()
    recipes = recipes or (folder / RECIPES if folder else default_recipes())
    deployments = read_deployments(folder or DEFAULT_FOLDER, recipes)
    automations = read_automations(folder or DEFAULT_FOLDER)
    check_server(url)
    from prefect.client.orchestration import get_client

    from requant.flows.start import server_errors
    from requant.flows.work_pool import problem_of_pool

    with server_errors(), get_client(sync_client=True) as client:
        make_pools(client)
        deployed = dict(apply_deployment(client, deployment) for deployment in deployments)
        applied = apply_automations(automations)
        notes = [problem for pool in POOLS if (problem := problem_of_pool(client, pool))]
    lines = [f"deployment {name}{'' if new else ' (unchanged)'}" for name, new in deployed.items()]
    lines += [f"automation {name}{'' if new else ' (unchanged)'}" for name, new in applied.items()]
    lines += [f"note: {note}" for note in notes]
    changed = [name for name, new in (deployed | applied).items() if new]
    document = DeployDocument(deployments=list(deployed), automations=list(applied), changed=changed, notes=notes)
    return CommandResult(document.to_json(), "\n".join(lines))
