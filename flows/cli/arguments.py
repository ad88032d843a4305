"""What several commands are told: a repo on the Hub, one at a revision, a Prefect server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from requant.tasks.errors import RecipeError, RequantError

if TYPE_CHECKING:
    from requant.tasks.hub.revision import Revision


def resolve_repo(name: str) -> Revision:
    """Resolve `repo_id[@revision]` to a commit. Raises RequantError for what cannot be a repo's name."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RequantError(f"{name} is not a folder: name a checkpoint's folder, or repo_id[@revision]")
    from requant.tasks.hub.revision import resolve

    repo_id, _, revision = name.partition("@")
    return resolve(repo_id, revision or "main")


def check_repo_id(name: str) -> str:
    """Return a repo's name as it is. Raises RequantError for what cannot be one."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise RequantError(f"{name} is not a repo on the Hub: name it as owner/name")
    return name


def server_url() -> str:
    """Return the address of the Prefect server in PREFECT_API_URL. Raises RecipeError if it is not set."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise RecipeError("PREFECT_API_URL is not set: name the Prefect server, as in http://127.0.0.1:4200/api")
    return url
