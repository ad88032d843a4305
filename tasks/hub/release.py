"""Staged publishing: upload to a branch, verify what the Hub says it holds, move `main` in one commit, tag.

Killed at any step, the next call goes on: the Hub keeps what was uploaded, `main` is the old model or the new one
and never a part of it, and an artifact that `main` already holds makes no commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, constants

from requant.tasks.artifact import GITATTRIBUTES, PICTURES, REWRITTEN, File, Manifest, file_of, git_blob_id
from requant.tasks.errors import HubError, HubUnavailable
from requant.tasks.hub.client import hub_api, hub_errors
from requant.tasks.hub.manifest import tag_of
from requant.tasks.hub.publish_target import open_target, refuse_changed
from requant.tasks.hub.revision import HubFile, Revision, resolve
from requant.tasks.recipe.recipe import Publish

BACK = "Back to "  # and a tag: the title of the commit that a rollback makes
log = logging.getLogger(__name__)
Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


@dataclass(frozen=True)
class Release:
    """What is on the Hub now, and whether this call changed it. `commit` is main's, or the pull request's."""

    repo_id: str
    commit: str
    tag: str
    changed: bool
    pull_request: str | None = None  # the address of one that waits to be merged

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.repo_id}"

    def to_json(self) -> dict[str, Any]:
        """What `--json` has under `published`."""
        return {**vars(self), "url": self.url}


def release(
    publish: Publish,
    base: Revision,
    folder: Path,
    manifest: Manifest,
    beside: Sequence[str],
) -> Release:
    """Make `main` of the recipe's repo hold exactly `manifest` and what lies `beside` it: card, recipe, report.

    All of them are files in `folder`. What lies beside is not compared: it goes with an artifact that is new there.
    With `publish.pull_request` main is left to whoever merges; the next call tags it.
    Raises HubError (no right to write, changed by someone else meanwhile) or HubUnavailable.
    """
    repo_id, tag = publish.repo_id, tag_of(base.sha, manifest.digest)
    message = f"Requant of {base.repo_id}@{base.sha[:7]} ({manifest.digest[:7]})"
    files = [*manifest.files, *(file_of(folder, path) for path in beside)]
    main = open_target(publish, base)
    changed = not holds(main, manifest.files, folder, aside={*REWRITTEN, *_pictures(main, manifest)})
    if not changed:
        log.info(f"{repo_id} already holds this artifact")
    else:
        refuse_changed(main, base, overwrite=publish.overwrite)
        if not publish.overwrite:
            _refuse_taken_back(repo_id, tag)
        if publish.pull_request:
            return _propose(repo_id, tag, message, folder, files)
        branch = f"requant-{manifest.digest[:12]}"
        with hub_errors(repo_id, branch):
            hub_api().create_branch(repo_id, branch=branch, revision=main.sha, exist_ok=True)
        staged = _stage(repo_id, branch, folder, files, message)
        main = _move_main(main, staged, folder, files, message)
    _finish(publish, manifest, main, tag, message)
    return Release(repo_id, main.sha, tag, changed)


def _refuse_taken_back(repo_id: str, tag: str) -> None:
    """Refuse to release again what a person has rolled back."""
    with hub_errors(repo_id):
        api = hub_api()
        latest = next(iter(api.list_repo_commits(repo_id)))
        taken_back = latest.title.startswith(BACK) and tag in {t.name for t in api.list_repo_refs(repo_id).tags}
    if taken_back:
        raise HubError(
            f"release {tag} of {repo_id} was rolled back: to have it again, requant publish {repo_id} --rollback "
            f"--to {tag}, or set publish.overwrite: true"
        )


def _propose(
    repo_id: str,
    tag: str,
    message: str,
    folder: Path,
    files: Sequence[File],
) -> Release:
    """Bring the files into a pull request of this name; one that is open already is used."""
    api = hub_api()
    with hub_errors(repo_id):
        asked = api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")
        found = next((d for d in asked if d.title == message), None)
        number = (
            found.num if found else api.create_pull_request(repo_id, title=message, description=f"Release {tag}").num
        )
    before = resolve(repo_id, f"refs/pr/{number}")
    staged = _stage(repo_id, f"refs/pr/{number}", folder, files, message)
    with hub_errors(repo_id):
        if api.get_discussion_details(repo_id, number).status == "draft":
            api.change_discussion_status(repo_id, number, "open")
    url = f"{constants.ENDPOINT}/{repo_id}/discussions/{number}"
    return Release(repo_id, staged.sha, tag, staged.sha != before.sha, url)


def _stage(repo_id: str, reference: str, folder: Path, files: Sequence[File], message: str) -> Revision:
    """Bring a branch or pull request to exactly these files, and check what the Hub says it holds."""
    before = resolve(repo_id, reference)
    there = {f.path: f for f in before.files}
    operations: list[Operation] = []
    for file in files:
        if file.path not in there or not same(there[file.path], file, folder):
            operation = CommitOperationAdd(file.path, folder / file.path)
            operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # known: the client need not hash it again
            operations.append(operation)
    operations += [CommitOperationDelete(path) for path in _stale(before, files)]
    if operations:
        log.info(f"uploading {len(operations)} changes to {reference} of {repo_id}")
        with hub_errors(repo_id, reference):
            hub_api().create_commit(
                repo_id, operations, commit_message=message, revision=reference, parent_commit=before.sha, num_threads=4
            )
    staged = resolve(repo_id, reference)
    if not holds(staged, files, folder):
        raise HubUnavailable(f"{reference} of {repo_id} does not hold what was uploaded: main stays as it is")
    return staged


def _move_main(main: Revision, staged: Revision, folder: Path, files: Sequence[File], message: str) -> Revision:
    """One commit on main with everything; large files are named by their sha256 and not sent again."""
    large = {file.path for file in staged.files if file.sha256 is not None}
    operations: list[Operation] = [
        CommitOperationCopy(file.path, file.path, src_revision=staged.sha)
        if file.path in large
        else CommitOperationAdd(file.path, folder / file.path)
        for file in files
    ]
    operations += [CommitOperationDelete(path) for path in _stale(main, files)]
    return commit_to_main(main, operations, message, lambda moved: holds(moved, files, folder))


def commit_to_main(
    main: Revision, operations: Sequence[Operation], message: str, arrived: Callable[[Revision], bool]
) -> Revision:
    """The one commit that moves main, on top of the main that was looked at. `arrived` says whether it came about."""
    try:
        with hub_errors(main.repo_id, "main"):
            hub_api().create_commit(
                main.repo_id, operations, commit_message=message, revision="main", parent_commit=main.sha
            )
    except HubError:
        # The answer may have been lost after the commit was made.
        if not arrived(resolve(main.repo_id)):
            raise
    moved = resolve(main.repo_id)
    if not arrived(moved):
        raise HubError(f"main of {main.repo_id} was changed by someone else meanwhile: look at it, then run again")
    return moved


def _finish(publish: Publish, manifest: Manifest, main: Revision, tag: str, message: str) -> None:
    """What can be done only when main holds the artifact: each of it once, however often it is asked for."""
    api, repo_id, branch = hub_api(), publish.repo_id, f"requant-{manifest.digest[:12]}"
    with hub_errors(repo_id):
        # A tag is never moved: if it is there, an earlier run of this artifact got that far.
        api.create_tag(repo_id, tag=tag, revision=main.sha, tag_message=message, exist_ok=True)
        if publish.collection is not None:
            api.add_collection_item(publish.collection, item_id=repo_id, item_type="model", exists_ok=True)
        if branch in {reference.name for reference in api.list_repo_refs(repo_id).branches}:
            api.delete_branch(repo_id, branch=branch)


def holds(revision: Revision, files: Iterable[File], folder: Path, aside: Iterable[str] = (GITATTRIBUTES,)) -> bool:
    """Whether a revision has exactly these files, by the Hub's hashes, those `aside` not counted."""
    ours, passed_over = {file.path: file for file in files}, set(aside)
    there = {f.path: f for f in revision.files if f.path not in passed_over}
    return set(there) == set(ours) and all(same(there[path], file, folder) for path, file in ours.items())


def same(theirs: HubFile, ours: File, folder: Path) -> bool:
    """Compare by sha256 where the Hub has one (LFS), else by git blob id."""
    if theirs.sha256 is not None:
        return theirs.sha256 == ours.sha256
    return theirs.size == ours.size and theirs.blob_id == git_blob_id(folder / ours.path)


def _pictures(revision: Revision, manifest: Manifest) -> list[str]:
    """The pictures of a card: they go with it, and are not compared."""
    return [f.path for f in revision.files if f.path.startswith(f"{PICTURES}/") and f.path not in manifest]


def _stale(revision: Revision, files: Iterable[File]) -> list[str]:
    """What is there and should not be."""
    kept = {GITATTRIBUTES, *(file.path for file in files)}
    return [path for path in (*(f.path for f in revision.files), *revision.left_out) if path not in kept]
