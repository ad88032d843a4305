"""What several commands are told: the address of a Prefect server."""

from __future__ import annotations

import os

from requant.tasks.errors import RecipeError


def server_url() -> str:
    """Return the address of the Prefect server in PREFECT_API_URL. Raises RecipeError if it is not set."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise RecipeError("PREFECT_API_URL is not set: name the Prefect server, as in http://127.0.0.1:4200/api")
    return url
