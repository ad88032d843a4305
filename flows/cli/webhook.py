"""`requant webhook`: receive the Hub's webhooks, and start runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import click

from requant.flows.cli.command import RECIPES
from requant.tasks.errors import RecipeError
from requant.tasks.store import open_store

MIN_SECRET_CHARACTERS = 16


@click.command("webhook")
@RECIPES
@click.option("--host", metavar="HOST", default="127.0.0.1", show_default=True, help="Listen on this address.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    default=8787,
    show_default=True,
    help="Listen on this port.",
)
def webhook(recipes: Path, host: str, port: int) -> None:
    """Receive the Hub's webhooks, and start runs for new commits.

    Runs start on the Prefect server that PREFECT_API_URL names. REQUANT_WEBHOOK_SECRET is the secret that was given to
    the webhook on the Hub, of 16 characters or more. The Hub sends its events to POST /hub; /health answers ok.

    \b
    Examples:
      requant webhook --host 127.0.0.1 --port 8080
      REQUANT_STORE=s3://bucket/prefix requant webhook --recipes recipes
    """
    from requant.tasks.settings import read_settings

    given = read_settings().webhook_secret
    secret = given.get_secret_value() if given else ""
    if len(secret) < MIN_SECRET_CHARACTERS:
        raise RecipeError(
            f"REQUANT_WEBHOOK_SECRET must be a secret of {MIN_SECRET_CHARACTERS} characters or more, as in the Hub"
        )
    if not os.environ.get("PREFECT_API_URL"):
        raise RecipeError("PREFECT_API_URL must name the Prefect server on which runs are to be started")
    if not recipes.is_dir():
        raise RecipeError(f"the folder {recipes} does not exist: name a folder of recipes with --recipes")
    open_store()  # Raises RecipeError for a wrong REQUANT_STORE, before the server listens.
    from requant.flows.webhook.serve import serve

    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    serve(secret, recipes, host, port)
