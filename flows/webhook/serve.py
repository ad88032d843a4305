"""Run the relay as a server."""

from __future__ import annotations

from pathlib import Path

import uvicorn

from requant.flows.start import start_on_server
from requant.flows.watching import watch_pass
from requant.flows.webhook.app import create_app
from requant.flows.webhook.connection import Connection
from requant.flows.webhook.looker import Looker


def serve(secret: str, recipes: Path, host: str, port: int) -> None:
    """Listen on `host` and `port` until interrupted. Payloads with `secret` start a pass over the folder `recipes`."""
    looker = Looker(lambda repos: watch_pass(recipes, start_on_server, repos))
    uvicorn.run(
        create_app(secret, looker),
        host=host,
        port=port,
        http=Connection,
        log_config=None,
        server_header=False,
        limit_concurrency=100,
        timeout_keep_alive=5,
    )
