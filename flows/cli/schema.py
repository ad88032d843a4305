"""`requant schema`: print the JSON Schema of a recipe, or of what a command prints with --json."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

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
    "init": "requant.flows.cli.documents:InitDocument",
    "verify": "requant.tasks.hub.verify:ReleaseCheck",
    "rollback": "requant.flows.cli.documents:PublishDocument",
    "publish": "requant.flows.cli.documents:PublishDocument",
    "watch": "requant.flows.watching:WatchDocument",
    "deploy": "requant.flows.cli.documents:DeployDocument",
    "store ls": "requant.flows.cli.documents:StoreListDocument",
    "store du": "requant.flows.cli.documents:StoreSizeDocument",
    "store verify": "requant.tasks.store.verify:StoreCheck",
    "store gc": "requant.flows.cli.documents:CollectionDocument",
    "store rm": "requant.flows.cli.documents:CollectionDocument",
    "store checkout": "requant.flows.cli.documents:CheckoutDocument",
    "store export": "requant.flows.cli.documents:CopyDocument",
    "store import": "requant.flows.cli.documents:CopyDocument",
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"  # of the schemas that pydantic makes


@command("schema")
@click.argument("words", metavar="[recipe | COMMAND]", nargs=-1)
def schema(words: tuple[str, ...]) -> CommandResult:
    """Print the JSON Schema of a recipe or of a command's document.

    COMMAND is the name of a command that takes --json. Without it, list these names. A command that fails prints
    another document, with the keys status and error.

    \b
    Examples:
      requant schema recipe > recipe.schema.json
      requant schema plan > plan.schema.json
    """
    name = " ".join(words)
    if not name:
        return CommandResult({"commands": list(MODELS)}, "\n".join(MODELS))
    if name == "recipe":
        return CommandResult(recipe_schema(), json.dumps(recipe_schema(), indent=1))
    if name not in MODELS:
        raise click.UsageError(f"no schema of {name!r}: there is one of recipe, {', '.join(MODELS)}")
    document = {"$schema": DIALECT, **model_of(name).model_json_schema(mode="serialization")}
    return CommandResult(document, json.dumps(document, indent=1))


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe's file, in which a base may be written as its name."""
    from requant.tasks.recipe.recipe import Recipe

    schema = {"$schema": DIALECT, **Recipe.model_json_schema()}
    base = schema["properties"]["base"]
    schema["properties"]["base"] = {
        "anyOf": [{"type": "string", "description": "owner/name[@revision], or a folder as ./folder"}, base]
    }
    return schema


def model_of(name: str) -> type[BaseModel]:
    """Import the model of a command's document."""
    module, _, model = MODELS[name].partition(":")
    imported: type[BaseModel] = getattr(importlib.import_module(module), model)
    return imported
