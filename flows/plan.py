"""The plan of a run as a flow, which shows it in Prefect's UI."""

from __future__ import annotations

from typing import Any

from prefect import State
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed, Failed

from requant.flows.recipe_flow import recipe_flow
from requant.flows.report.plan import plan_headline, plan_markdown, subject
from requant.tasks.errors import Refused, RequantError
from requant.tasks.plan import plan as plan_run
from requant.tasks.planning.document import PlanDocument
from requant.tasks.recipe.loader import recipe_of
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import open_store


@recipe_flow("plan")
def plan(recipe: Recipe, elsewhere: bool = True) -> State[Any]:
    """Plan a run of a recipe; fails if a problem would stop it. `elsewhere`: it will run on another machine."""
    try:
        document = _plan_and_show(recipe_of(recipe), elsewhere)
    except RequantError as error:  # The message is the sentence alone, without the words that Prefect adds.
        return Failed(message=str(error), data=error)
    return Completed(data=document.to_json())  # Whoever reads the result of a run needs no Requant.


def _plan_and_show(recipe: Recipe, elsewhere: bool) -> PlanDocument:
    """Plan a run, and show the plan in Prefect's UI. Raises Refused if a problem would stop the run."""
    document = plan_run(open_store(), recipe, elsewhere=elsewhere)
    text = plan_markdown(document, f"plan of {recipe.base.name}")
    create_markdown_artifact(text, key="requant-plan", description=f"{subject(document)}: {plan_headline(document)}")
    stages = [stage.to_json() for stage in document.stages]
    create_table_artifact(stages, key="requant-plan-stages", description="What would run, and how long")
    if document.problems:
        raise Refused("; ".join(document.problems))
    return document
