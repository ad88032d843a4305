"""Flows that get a recipe, and the names of their runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from prefect import Flow, flow, runtime

from requant.startup import turn_off_telemetry
from requant.tasks.environment import bypass_proxy_on_loopback
from requant.tasks.pipeline.log import log_into_runs
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.recipe.recipe import Recipe

# A worker's process imports the flows, and not the command line.
log_into_runs()
bypass_proxy_on_loopback(os.environ)
turn_off_telemetry(os.environ)

P = ParamSpec("P")
R = TypeVar("R")


def run_name() -> str:
    """Name a run in Prefect's lists, after its recipe, which may be invalid."""
    given = runtime.flow_run.parameters.get("recipe")
    recipe = given.model_dump() if isinstance(given, Recipe) else _mapping_or_empty(given)
    base, quantize = _mapping_or_empty(recipe.get("base")), _mapping_or_empty(recipe.get("quantize"))
    repo = str(base.get("folder") or base.get("repo_id") or "a base without a name").split("/")[-1]
    outputs, bits = recipe.get("outputs"), quantize.get("bits")
    if isinstance(outputs, list) and outputs:
        makes = f"{len(outputs)} outputs"
    elif bits:
        makes = f"W{bits}A16"
    else:
        makes = str(quantize.get("scheme") or Quantize.model_fields["scheme"].default)
    return f"{repo} {makes}"[:200]


def _mapping_or_empty(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def recipe_flow(name: str, **more: Any) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Return the decorator of a flow that gets a recipe; `more` has further options of Prefect's `flow`.

    Prefect does not validate the parameters, because `recipe_of` says in a sentence what is wrong with a recipe.
    """
    return flow(name=name, flow_run_name=run_name, validate_parameters=False, persist_result=False, **more)
