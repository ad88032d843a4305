"""Run the relay: `python -m infra.webhook`. REQUANT_WEBHOOK_SECRET is the secret that the Hub's webhook was given."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import uvicorn

from flows.start import start_on_server
from flows.tracked import RECIPES, watch_pass
from infra.webhook.app import create_app
from infra.webhook.connection import Connection
from infra.webhook.looker import Looker
from tasks.environment import bypass_proxy_on_loopback
from tasks.errors import RequantError
from tasks.log import Plain
from tasks.store import open_store

MIN_SECRET = 16  # characters


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.webhook", description=__doc__)
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="the folder of recipes whose bases are watched")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8787)
    return parser.parse_args()


def _secret() -> str:
    """Raises SystemExit with a sentence for a setting without which the relay must not run."""
    secret = os.environ.get("REQUANT_WEBHOOK_SECRET", "")
    if len(secret) < MIN_SECRET:
        sys.exit(f"requant: REQUANT_WEBHOOK_SECRET must be a secret of {MIN_SECRET} characters or more, as in the Hub")
    if not os.environ.get("PREFECT_API_URL"):
        sys.exit("requant: PREFECT_API_URL must name the Prefect server on which runs are to be started")
    return secret


def main() -> None:
    """Serve until interrupted."""
    bypass_proxy_on_loopback(os.environ)
    arguments, secret = _arguments(), _secret()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Plain())
    if not arguments.recipes.is_dir():
        sys.exit(f"requant: the folder of recipes {arguments.recipes} does not exist: name one with --recipes")
    try:
        open_store()
    except RequantError as error:
        sys.exit(f"requant: {error}")
    looker = Looker(lambda repos: watch_pass(arguments.recipes, start_on_server, repos))
    uvicorn.run(
        create_app(secret, looker),
        host=arguments.host,
        port=arguments.port,
        http=Connection,
        log_config=None,
        server_header=False,
        limit_concurrency=100,
        timeout_keep_alive=5,
    )


if __name__ == "__main__":
    main()
