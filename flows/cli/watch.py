"""`requant watch`: look for new base revisions and start runs."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from requant.flows.cli.command import RECIPES, CommandResult, command, progress
from requant.tasks.errors import RecipeError, RequantError

if TYPE_CHECKING:
    from requant.flows.watching import Start


@command("watch")
@click.option(
    "--once", is_flag=True, help="Do one pass and exit, with status 1 if a recipe had a problem or a run was rejected."
)
@RECIPES
@click.option(
    "--interval",
    type=click.IntRange(min=10),
    default=900,
    metavar="SECONDS",
    show_default=True,
    help="Wait for this many seconds between passes. Without effect if --once is given.",
)
def watch(once: bool, recipes: Path, interval: int) -> CommandResult:
    """Look for new revisions of the recipes' bases, and start runs.

    Runs start on the Prefect server that PREFECT_API_URL names. Without a server they happen on this machine, one
    after another.

    \b
    Examples:
      requant watch --once
      requant watch --recipes deployments/recipes --interval 3600
    """
    from requant.flows.watching import watch_pass

    served = bool(os.environ.get("PREFECT_API_URL"))
    with contextlib.ExitStack() as prefect:

        @functools.cache
        def starter() -> Start:
            """Start the embedded Prefect server, or check that of PREFECT_API_URL, once a run is due."""
            from requant.flows.embedded import embedded_prefect

            prefect.enter_context(embedded_prefect())
            from requant.flows.start import start_here, start_on_server

            return start_on_server if served else start_here

        while True:
            try:
                done = watch_pass(recipes, lambda store, due: starter()(store, due))
                if once:
                    break
                progress(done.text)
            except RecipeError:
                raise
            except RequantError as error:
                if once:
                    raise
                progress(f"no pass: {error}")  # The store or the server may answer again at the next one.
            time.sleep(interval)
    failed = done.problems or any(started.status == "rejected" for started in done.started)
    return CommandResult(done.document().to_json(), done.text, 1 if failed else 0)
