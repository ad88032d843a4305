"""`requant plan`: the dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.flows.cli.command import NEW_FILE, command


@command("plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as in quantize.iters=50.")
@click.option(
    "--elsewhere", is_flag=True, help="The run will be on another machine: this one's disk and tools do not matter."
)
@click.option("--markdown", "markdown_path", type=NEW_FILE, help="Write the plan as markdown here too.")
def plan(
    recipe: Path, overrides: tuple[str, ...], elsewhere: bool, markdown_path: Path | None
) -> tuple[dict[str, Any], str, int]:
    """Say what a run will do, take and cost, from headers alone: no weights, no GPU.

    Exit status 1: a problem would stop the run.
    """
    from requant.flows.report.plan import markdown, render
    from requant.tasks.checkpoint.writer import write_file
    from requant.tasks.plan import plan as make_plan
    from requant.tasks.recipe.loader import load_recipe
    from requant.tasks.store import open_store

    loaded = load_recipe(recipe, overrides)
    document = make_plan(open_store(), loaded, elsewhere=elsewhere)
    if markdown_path is not None:
        write_file(markdown_path.parent, markdown_path.name, [markdown(document, recipe.name).encode()])
    return document.to_json(), render(document), 1 if document.problems else 0
