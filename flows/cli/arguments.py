"""What arguments of several commands name: a repo on the Hub, or one at a revision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from requant.tasks.errors import RequantError

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
