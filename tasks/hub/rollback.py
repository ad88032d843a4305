"""Rollback: `main` holds again what it held before the last release. One commit, and no weights are sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from huggingface_hub import CommitOperationCopy, CommitOperationDelete

from requant.tasks.errors import HubError
from requant.tasks.hub.client import hub_api, hub_errors
from requant.tasks.hub.manifest import ReleaseManifest, read_release
from requant.tasks.hub.publish_target import join_problems
from requant.tasks.hub.release import BACK, Operation, Release, commit_to_main
from requant.tasks.hub.revision import Revision, resolve

log = logging.getLogger(__name__)


def rollback(repo_id: str, to: str | None = None, *, overwrite: bool = False) -> Release:
    """Move `main` back to the release before the one that it holds, or to the release with the tag `to`.

    Asked for twice, it goes one release back, not two: to go on, name a tag. `overwrite`: also where someone else
    changed main since. Raises HubError (no such release; changed by someone else) or HubUnavailable.
    """
    main = resolve(repo_id)
    claimed = None if overwrite else read_release(main)
    if claimed is None and not overwrite:
        raise HubError(f"{repo_id} holds no release of Requant: name a repo that Requant published to")
    changed = claimed.differences(main) if claimed else []
    if changed:
        raise HubError(
            f"{repo_id} was changed by someone else since its last release ({join_problems(changed)}): "
            "look at it, then undo that, or add --overwrite"
        )
    tag = to or _before(main, claimed)
    goal = resolve(repo_id, tag)
    _check_goal(goal, tag)
    if _same(main, goal):
        log.info(f"{repo_id} already holds release {tag}")
        return Release(repo_id, main.sha, tag, False)
    if claimed:  # a kill may have kept its tag from it: what is left must be found again
        with hub_errors(repo_id):
            hub_api().create_tag(repo_id, tag=claimed.tag, revision=main.sha, exist_ok=True)
    moved = commit_to_main(main, _operations(main, goal), f"{BACK}{tag}", lambda there: _same(there, goal))
    return Release(repo_id, moved.sha, tag, True)


def _before(main: Revision, claimed: ReleaseManifest | None) -> str:
    """The tag of the release that main held before the one that it holds now."""
    held = _releases(main.repo_id)
    now = claimed.tag if claimed else held[0][0] if held else ""
    if held and held[0] == (now, True):
        return now  # it was moved back already
    before = next((tag for tag, _ in held if tag != now), None)
    if before is None:
        raise HubError(f"{main.repo_id} has no release before {now or 'the first'}: there is nothing to move back to")
    return before


def _releases(repo_id: str) -> Sequence[tuple[str, bool]]:
    """What main held, newest first: the tag of each release, and whether main was moved back to it."""
    with hub_errors(repo_id):
        api = hub_api()
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
        commits = api.list_repo_commits(repo_id)
    made = {commit: name for name, commit in sorted(tags.items(), reverse=True)}
    held = []
    for commit in commits:
        back_to = commit.title.removeprefix(BACK)
        if commit.title.startswith(BACK) and back_to in tags:
            held.append((back_to, True))
        elif commit.commit_id in made:
            held.append((made[commit.commit_id], False))
    return held


def _check_goal(goal: Revision, tag: str) -> None:
    claimed = read_release(goal)
    if claimed is None:
        raise HubError(f"{tag} of {goal.repo_id} is no release of Requant: name the tag of one")
    if changed := claimed.differences(goal):
        raise HubError(
            f"{tag} of {goal.repo_id} is not what it claims to be ({join_problems(changed)}): name another release"
        )


def _operations(main: Revision, goal: Revision) -> list[Operation]:
    """What makes main the goal: large files are named by their sha256, small ones pass through this machine."""
    held = {file.path: file for file in main.files}
    wanted = {file.path for file in goal.files}
    return [
        *(CommitOperationCopy(f.path, f.path, src_revision=goal.sha) for f in goal.files if held.get(f.path) != f),
        *(CommitOperationDelete(path) for path in (*held, *main.left_out) if path not in wanted),
    ]


def _same(one: Revision, other: Revision) -> bool:
    return (one.files, one.left_out) == (other.files, other.left_out)
