"""The dry run as a flow: everything that can be known before weights move, in Prefect's UI."""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed, Failed

from requant.flows.gpu_pool import OPTIONS
from requant.flows.report.plan import markdown, plan_headline, subject
from requant.tasks import plan as planning
from requant.tasks.errors import Refused, RequantError
from requant.tasks.pipeline.log import log_into_runs
from requant.tasks.recipe.loader import recipe_of
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import open_store

log_into_runs()


@flow(name="plan", **OPTIONS)
def plan(recipe: Recipe, elsewhere: bool = True) -> State[Any]:
    """Plan a run of a recipe; fails if a problem would stop it. `elsewhere`: it will run on another machine."""
    try:
        return Completed(data=_plan(recipe_of(recipe), elsewhere))
    except RequantError as error:  # the state says what is wrong in a sentence, without the words that Prefect adds
        return Failed(message=str(error), data=error)


def _plan(recipe: Recipe, elsewhere: bool) -> dict[str, Any]:
    """Plan, and show it in the UI. Returns the document as JSON: whoever reads the result of a run needs no Requant."""
    document = planning.plan(open_store(), recipe, elsewhere=elsewhere)
    text = markdown(document, f"plan of {recipe.base.repo_id}")
    create_markdown_artifact(text, key="requant-plan", description=f"{subject(document)}: {plan_headline(document)}")
    stages = [stage.to_json() for stage in document.stages]
    create_table_artifact(stages, key="requant-plan-stages", description="What would run, and how long")
    if document.problems:
        raise Refused("; ".join(document.problems))
    return document.to_json()
