"""`requant worker`: a Prefect worker that also heals runs whose process is gone."""

from __future__ import annotations

import signal
import sys
import threading

import click

from requant.flows.cli.arguments import server_url


@click.command("worker", context_settings={"ignore_unknown_options": True}, options_metavar="")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="--pool POOL [OPTIONS]")
def worker(arguments: tuple[str, ...]) -> None:
    """Start a Prefect worker, and restart runs whose process is gone.

    PREFECT_API_URL names the Prefect server. The options are those of `prefect worker start`. A run whose process is
    gone is restarted, or ended if somebody cancelled it. One worker that was started by this command does so for the
    runs of all work pools of the server; several may do so at the same time.

    \b
    Examples:
      requant worker --pool cpu
      CUDA_VISIBLE_DEVICES=0 requant worker --pool gpu --name gpu-0 --limit 1
    """
    url = server_url()
    from requant.flows.embedded import check_server

    check_server(url)
    from prefect.cli import app

    from requant.flows.sweep import sweep_for_ever

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Prefect's worker installs its own handler.
    threading.Thread(target=sweep_for_ever, name="sweep", daemon=True).start()
    sys.argv = ["prefect", "worker", "start", *arguments]  # Prefect's command line reads its arguments from here.
    app()
