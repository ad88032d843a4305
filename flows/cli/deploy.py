"""`requant deploy`: put deployments, recipes and work pools on a Prefect server."""

from __future__ import annotations

from pathlib import Path

import click

from requant.flows.cli.arguments import server_url
from requant.flows.cli.command import CommandResult, command


@command("deploy")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True), default="deployments")
def deploy(folder: Path) -> CommandResult:
    """Put deployments, recipes and work pools on a Prefect server.

    PREFECT_API_URL names the server. FOLDER (default: deployments) holds prefect.yaml, recipes/ and, if there are
    automations, automations.yaml. What the server already has in the same form is left alone, and what somebody
    paused stays paused. Missing work pools are created, of the type process.

    \b
    Examples:
      requant deploy
      PREFECT_API_URL=http://prefect:4200/api requant deploy deployments
    """
    url = server_url()
    from requant.flows.cli.documents import DeployDocument
    from requant.flows.deployment import (
        POOLS,
        apply_automations,
        apply_deployment,
        make_pools,
        read_automations,
        read_deployments,
    )
    from requant.flows.embedded import check_server

    deployments = read_deployments(folder)
    automations = read_automations(folder)
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
