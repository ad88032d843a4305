"""Rollback: move `main` back to an earlier release, in one commit and without an upload of weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import CommitOperationCopy, CommitOperationDelete

from requant.tasks.errors import HubError
from requant.tasks.hub.client import hub_api, hub_errors
from requant.tasks.hub.manifest import ReleaseManifest, read_release
from requant.tasks.hub.publish_target import join_problems
from requant.tasks.hub.release import ROLLBACK_TITLE, Operation, Release, commit_to_main
from requant.tasks.hub.revision import Revision, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollback:
    """The way from what `main` holds to the release with the tag `tag`. `claimed` is the release on `main`."""

    main: Revision
    goal: Revision
    tag: str
    claimed: ReleaseManifest | None

    @property
    def paths(self) -> list[str]:
        """The files that `main` gets, loses or has changed."""
        ours, theirs = ({file.path: file for file in side.files} for side in (self.main, self.goal))
        differing = (path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path))
        return sorted({*differing, *self.main.left_out} - {*self.goal.left_out})


def find_rollback(repo_id: str, to: str | None = None, *, overwrite: bool = False) -> Rollback:
    """Find the release before the current one, or the release with the tag `to`, and check it. Nothing is changed.

    With `overwrite`, `main` may have changes that someone else made. Raises HubError (no such release, or changes by
    someone else) or HubUnavailable.
    """
    main = resolve(repo_id)
    claimed = None if overwrite else read_release(main)
    if claimed is None and not overwrite:
        raise HubError(f"{repo_id} holds no release of Requant: name a repo that Requant published to", repo_id=repo_id)
    changed = claimed.differences(main) if claimed else []
    if changed:
        raise HubError(
            f"{repo_id} was changed by someone else since its last release ({join_problems(changed)}): "
            "look at it, then undo that, or add --overwrite",
            repo_id=repo_id,
        )
    tag = to or _find_previous(main, claimed)
    try:
        goal = resolve(repo_id, tag)
    except HubError as error:
        if error.retryable:
            raise
        releases = ", ".join(release_tags(repo_id)) or "none"
        raise HubError(f"{repo_id} has no release {tag}: its releases are {releases}", repo_id=repo_id) from error
    _check_goal(goal, tag)
    return Rollback(main, goal, tag, claimed)


def rollback(repo_id: str, to: str | None = None, *, overwrite: bool = False) -> Release:
    """Move `main` back to the release before the current one, or to the release with the tag `to`.

    A second call without `to` changes nothing: to go further back, name a tag. With `overwrite`, changes that someone
    else made to `main` are lost. Raises as `find_rollback` does.
    """
    found = find_rollback(repo_id, to, overwrite=overwrite)
    main, goal, tag = found.main, found.goal, found.tag
    if _same(main, goal):
        log.info(f"{repo_id} already holds release {tag}")
        return Release(repo_id=repo_id, commit=main.sha, tag=tag, changed=False)
    if found.claimed:  # a killed run may not have tagged the current release, which a later rollback must find
        with hub_errors(repo_id):
            hub_api().create_tag(repo_id, tag=found.claimed.tag, revision=main.sha, exist_ok=True)
    moved = commit_to_main(main, _operations(main, goal), f"{ROLLBACK_TITLE}{tag}", lambda moved: _same(moved, goal))
    return Release(repo_id=repo_id, commit=moved.sha, tag=tag, changed=True)


def release_tags(repo_id: str) -> list[str]:
    """Return the tags of the releases that `main` had, newest first. Raises HubError or HubUnavailable."""
    return list(dict.fromkeys(tag for tag, _ in _list_releases(repo_id)))


def _find_previous(main: Revision, claimed: ReleaseManifest | None) -> str:
    """Return the tag of the release before the current one. Raises HubError if there is none."""
    releases = _list_releases(main.repo_id)
    current = claimed.tag if claimed else releases[0][0] if releases else ""
    if releases and releases[0] == (current, True):
        return current  # main was rolled back already
    previous = next((tag for tag, _ in releases if tag != current), None)
    if previous is None:
        raise HubError(
            f"{main.repo_id} has no release before {current or 'the first'}: there is nothing to move back to; its "
            f"releases are {', '.join(dict.fromkeys(tag for tag, _ in releases)) or 'none'}"
        )
    return previous


def _list_releases(repo_id: str) -> Sequence[tuple[str, bool]]:
    """List the releases that `main` had, newest first: their tags, and whether `main` was rolled back to them."""
    with hub_errors(repo_id):
        api = hub_api()
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
        commits = api.list_repo_commits(repo_id)
    tag_of_commit = {commit: name for name, commit in sorted(tags.items(), reverse=True)}
    releases = []
    for commit in commits:
        goal = commit.title.removeprefix(ROLLBACK_TITLE)
        if commit.title.startswith(ROLLBACK_TITLE) and goal in tags:
            releases.append((goal, True))
        elif commit.commit_id in tag_of_commit:
            releases.append((tag_of_commit[commit.commit_id], False))
    return releases


def _check_goal(goal: Revision, tag: str) -> None:
    claimed = read_release(goal)
    if claimed is None:
        raise HubError(f"{tag} of {goal.repo_id} is no release of Requant: name the tag of one", repo_id=goal.repo_id)
    if changed := claimed.differences(goal):
        raise HubError(
            f"{tag} of {goal.repo_id} is not what it claims to be ({join_problems(changed)}): name another release",
            repo_id=goal.repo_id,
        )


def _operations(main: Revision, goal: Revision) -> list[Operation]:
    """Return the operations that turn `main` into `goal`.

    The client copies large files by their sha256, and downloads and uploads small ones.
    """
    on_main = {file.path: file for file in main.files}
    wanted = {file.path for file in goal.files}
    return [
        *(CommitOperationCopy(f.path, f.path, src_revision=goal.sha) for f in goal.files if on_main.get(f.path) != f),
        *(CommitOperationDelete(path) for path in (*on_main, *main.left_out) if path not in wanted),
    ]


def _same(one: Revision, other: Revision) -> bool:
    return (one.files, one.left_out) == (other.files, other.left_out)
