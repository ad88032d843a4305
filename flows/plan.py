"""The dry run as a flow: everything that can be known before weights move, in Prefect's UI."""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed, Failed

from flows.gpu import OPTIONS
from flows.plan_report import headline, markdown, subject
from tasks import plan as planning
from tasks.errors import Refused, RequantError
from tasks.log import plain_logs
from tasks.recipe import Recipe
from tasks.recipe_file import recipe_of
from tasks.store import open_store

plain_logs()


@flow(name="plan", **OPTIONS)
def plan(recipe: Recipe, elsewhere: bool = True) -> State[Any]:
    """Plan a run of a recipe; fails if a problem would stop it. `elsewhere`: it will run on another machine."""
    try:
        return Completed(data=_plan(recipe_of(recipe), elsewhere))
    except RequantError as error:  # the state says what is wrong in a sentence, without the words that Prefect adds
        return Failed(message=str(error), data=error)


def _plan(recipe: Recipe, elsewhere: bool) -> dict[str, Any]:
    document = planning.plan(open_store(), recipe, elsewhere=elsewhere)
    text = markdown(document, f"plan of {recipe.base.repo_id}")
    create_markdown_artifact(text, key="requant-plan", description=f"{subject(document)}: {headline(document)}")
    create_table_artifact(document["stages"], key="requant-plan-stages", description="What would run, and how long")
    if document["problems"]:
        raise Refused("; ".join(document["problems"]))
    return document
