"""`requant worker`: a Prefect worker that also heals runs whose process is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading

import click

from requant.tasks.errors import RecipeError


@click.command("worker", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="--pool POOL [OPTIONS]")
def worker(arguments: tuple[str, ...]) -> None:
    """Start a worker of the Prefect server at PREFECT_API_URL, and end or restart runs whose process is gone.

    It takes the options of `prefect worker start`, such as --pool gpu --name gpu-0 --limit 1. One worker started in
    this way heals the runs of all work pools of a server; any number may do so at a time.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise RecipeError("PREFECT_API_URL is not set: name the Prefect server, as in http://127.0.0.1:4200/api")
    from requant.flows.embedded import check_server

    check_server(url)
    from prefect.cli import app

    from requant.flows.sweep import sweep_for_ever

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Prefect's worker handles it itself: it waits for its runs.
    threading.Thread(target=sweep_for_ever, name="sweep", daemon=True).start()
    sys.argv = ["prefect", "worker", "start", *arguments]  # which Prefect's command line reads its arguments from
    app()
