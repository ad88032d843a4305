"""`requant schema`: print the JSON Schema of what a command prints with --json."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING

import click

from requant.flows.cli.command import CommandResult, command

if TYPE_CHECKING:
    from pydantic import BaseModel

# The pydantic model of each command's document, as a string: help texts must not wait for the import of pydantic.
MODELS = {
    "run": "requant.flows.report.document:RunDocument",
    "plan": "requant.tasks.planning.document:PlanDocument",
    "inspect": "requant.tasks.checkpoint.document:InspectDocument",
    "mtp-fix": "requant.tasks.checkpoint.document:MtpFixDocument",
    "validate": "requant.tasks.validating.document:ValidationDocument",
    "compare": "requant.tasks.validating.comparison:ComparisonDocument",
    "bench": "requant.tasks.serving.result:BenchmarkResult",
    "verify": "requant.tasks.hub.verify:ReleaseCheck",
    "publish": "requant.flows.cli.documents:PublishDocument",
    "watch": "requant.flows.watching:WatchDocument",
    "deploy": "requant.flows.cli.documents:DeployDocument",
    "store ls": "requant.flows.cli.documents:StoreListDocument",
    "store verify": "requant.tasks.store.verify:StoreCheck",
    "store gc": "requant.flows.cli.documents:CollectionDocument",
    "store checkout": "requant.flows.cli.documents:CheckoutDocument",
    "store export": "requant.flows.cli.documents:CopyDocument",
    "store import": "requant.flows.cli.documents:CopyDocument",
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"  # of the schemas that pydantic makes


@command("schema")
@click.argument("words", metavar="[COMMAND]", nargs=-1)
def schema(words: tuple[str, ...]) -> CommandResult:
    """Print the JSON Schema of what a command prints with --json.

    Without COMMAND, list the commands that print a document. A command that fails prints another
    document, with the keys status and error.

    \b
    Examples:
      requant schema
      requant schema plan > plan.schema.json
    """
    name = " ".join(words)
    if not name:
        return CommandResult({"commands": list(MODELS)}, "\n".join(MODELS))
    if name not in MODELS:
        raise click.UsageError(f"no schema of {name!r}: there is one of {', '.join(MODELS)}")
    document = {"$schema": DIALECT, **model_of(name).model_json_schema(mode="serialization")}
    return CommandResult(document, json.dumps(document, indent=1))


def model_of(name: str) -> type[BaseModel]:
    """Import the model of a command's document."""
    module, _, model = MODELS[name].partition(":")
    imported: type[BaseModel] = getattr(importlib.import_module(module), model)
    return imported
