"""`requant schema`: the schemas of the documents that commands print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from click.testing import CliRunner
from pydantic import BaseModel

import requant
from requant.flows.cli.main import cli
from requant.flows.cli.schema import DIALECT, MODELS, model_of
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.checkpoint.repair import RepairSource, repair
from requant.tasks.planning.document import PlanDocument
from tests.factories.paths import ROOT
from tests.factories.pico import pico_base
from tests.factories.repairs import elsewhere

PLANS = json.loads((ROOT / "tests" / "unit" / "tasks" / "planning" / "plans.json").read_text())


def schema_of(name: str) -> dict[str, Any]:
    outcome = CliRunner().invoke(cli, ["schema", *name.split()])
    assert outcome.exit_code == 0, outcome.output
    schema: dict[str, Any] = json.loads(outcome.stdout)
    return schema


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of a document and of its parts, with its own schema."""
    for part in (schema, *schema.get("$defs", {}).values()):
        yield from ((f"{part['title']}.{name}", value) for name, value in part.get("properties", {}).items())


def test_it_lists_the_commands_that_have_a_schema() -> None:
    assert CliRunner().invoke(cli, ["schema"]).stdout.split("\n") == [*MODELS, ""]
    assert json.loads(CliRunner().invoke(cli, ["schema", "--json"]).stdout) == {"commands": list(MODELS)}


WITHOUT_DOCUMENT = {"webhook", "worker", "schema"}  # The first two do not end; the document of schema is a schema.
# Commands that are no functions of the package, although their documents have a model.
WITHOUT_FUNCTION = {"bench", "init", "rollback", "publish", "watch", "deploy"}


def test_every_command_is_in_the_schema_or_is_known_to_have_none() -> None:
    groups = {name: command for name, command in cli.commands.items() if isinstance(command, click.Group)}
    below = {f"{group} {name}" for group, command in groups.items() for name in command.commands}
    assert {*MODELS} == (set(cli.commands) - set(groups) | below) - WITHOUT_DOCUMENT


def test_every_command_with_a_model_is_a_function_of_the_package() -> None:
    functions = {name for name in requant.__all__ if name.islower()}
    assert functions == {name.replace("-", "_") for name in {*MODELS} - WITHOUT_FUNCTION if " " not in name}


@pytest.mark.parametrize("name", MODELS)
def test_each_is_a_schema_of_a_command_and_explains_every_key(name: str) -> None:
    group: Any = cli
    for word in name.split():
        group = group.commands[word]
    assert issubclass(model_of(name), BaseModel)
    schema = schema_of(name)
    assert schema["$schema"] == DIALECT == jsonschema.Draft202012Validator.META_SCHEMA["$id"]
    jsonschema.Draft202012Validator.check_schema(schema)
    assert [key for key, value in properties(schema) if not value.get("description")] == []


@pytest.mark.parametrize("case", PLANS)
def test_documents_of_plan_are_as_the_schema_says(case: str) -> None:
    schema = schema_of("plan")
    jsonschema.validate(PLANS[case], schema)
    jsonschema.validate(PlanDocument.model_validate(PLANS[case]).to_json(), schema)
    for wrong in ({"surprise": 1}, {"problems": None}, {"stages": [{"name": "download"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**PLANS[case], **wrong}, schema)
    without = {key: value for key, value in PLANS[case].items() if key != "base"}
    with pytest.raises(jsonschema.ValidationError, match="'base' is a required property"):
        jsonschema.validate(without, schema)


def test_documents_of_inspect_and_mtp_fix_are_as_their_schemas_say(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    made = elsewhere(base, tmp_path / "made", packed=("mtp.fc",))
    for folder in (base, made):
        jsonschema.validate(inspect_checkpoint(folder).to_json(), schema_of("inspect"))
    repaired = repair(made, RepairSource(base), dry_run=True)
    jsonschema.validate(repaired.to_json(), schema_of("mtp-fix"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**repaired.to_json(), "surprise": 1}, schema_of("mtp-fix"))


@pytest.mark.parametrize("words", [["nothing"], ["plan", "nothing"], ["store", "ls", "x"]])
def test_a_command_without_a_schema_is_a_wrong_usage_that_says_which_have_one(words: list[str]) -> None:
    outcome = CliRunner().invoke(cli, ["schema", *words])
    assert outcome.exit_code == 2
    assert f"no schema of '{' '.join(words)}': there is one of recipe, {', '.join(MODELS)}" in outcome.output
