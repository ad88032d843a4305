"""The dry run as a flow: everything that can be known before weights move, in Prefect's UI."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.plan_report import headline, markdown, subject
from tasks import plan as planning
from tasks.errors import Refused
from tasks.log import plain_logs
from tasks.recipe import Recipe
from tasks.store import open_store

plain_logs()


@flow(name="plan", persist_result=False)
def plan(recipe: Recipe, elsewhere: bool = True) -> dict[str, Any]:
    """Plan a run of a recipe; fails if a problem would stop it. `elsewhere`: it will run on another machine."""
    document = planning.plan(open_store(), recipe, elsewhere=elsewhere)
    text = markdown(document, f"plan of {recipe.base.repo_id}")
    create_markdown_artifact(text, key="requant-plan", description=f"{subject(document)}: {headline(document)}")
    create_table_artifact(document["stages"], key="requant-plan-stages", description="What would run, and how long")
    if document["problems"]:
        raise Refused("; ".join(document["problems"]))
    return document
