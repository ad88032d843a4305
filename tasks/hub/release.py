"""Staged publishing: upload to a branch, compare the files that the Hub lists, move `main` in one commit, and tag it.

After a kill at any step, the next call continues: the Hub keeps what was uploaded. `main` has either the old release or
the new one, and never a part of it. No commit is made if `main` already has the artifact.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, constants
from pydantic import ConfigDict, Field, computed_field

from requant.tasks.artifact import GITATTRIBUTES, PICTURES, REWRITTEN, File, Manifest, file_of, git_blob_id
from requant.tasks.documents import Document
from requant.tasks.errors import HubError, HubUnavailable
from requant.tasks.formatting import gigabytes
from requant.tasks.hub.client import hub_api, hub_errors, upload_bars
from requant.tasks.hub.manifest import read_release, tag_of
from requant.tasks.hub.publish_target import open_target, refuse_changed
from requant.tasks.hub.revision import HubFile, Revision, resolve
from requant.tasks.recipe.recipe import Publish

ROLLBACK_TITLE = "Back to "  # prefix of a rollback's commit title; the tag follows
log = logging.getLogger(__name__)
Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


class Release(Document):
    """A release on the Hub."""

    model_config = ConfigDict(extra="ignore")

    repo_id: str = Field(description="The repo")
    commit: str = Field(description="The commit of main, or of the pull request in which the release waits")
    tag: str = Field(description="The release's tag")
    changed: bool = Field(description="Whether this run made the release")
    pull_request: str | None = Field(None, description="Address of the pull request, or null")

    @computed_field(description="Address of the repo")  # type: ignore[prop-decorator]
    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.repo_id}"


class RolledBack(HubError):
    """A person moved `main` away from a release that would be published again."""


def release(
    publish: Publish,
    base: Revision,
    folder: Path,
    manifest: Manifest,
    release_files: Sequence[str],
    *,
    bits: int,
) -> Release:
    """Make `main` of the recipe's repo hold exactly the artifact and its release files: card, recipe, report, pictures.

    `folder` has the files of both, and `bits` are those of the quantized weights. If `main` already has the artifact,
    changed release files alone do not create a new release. With `publish.pull_request`, open a pull request; once it
    is merged, the next call creates the tag.
    Raises HubError (no write access, or a change by someone else) or HubUnavailable.
    """
    repo_id, tag, message = publish.repo_id, tag_of(base.sha, manifest.digest), _title(base, manifest)
    files = [*manifest.files, *(file_of(folder, path) for path in release_files)]
    main = open_target(publish, base)
    branch = f"requant-{manifest.digest[:12]}"
    # Release files differ from run to run, for example in measured speeds, and the Hub writes .gitattributes itself.
    ignored = {*REWRITTEN, *_list_pictures(main, manifest)}
    if has_exactly(main, manifest.files, folder, ignored=ignored):
        log.info(f"{repo_id} already holds this artifact")
        _finish(publish, branch, main, tag, message)
        return Release(repo_id=repo_id, commit=main.sha, tag=tag, changed=False)
    refuse_changed(main, base, bits, overwrite=publish.overwrite)
    if not publish.overwrite:
        _refuse_rolled_back(repo_id, tag, message)
    if publish.pull_request:
        return _propose(repo_id, tag, message, folder, files)
    with hub_errors(repo_id, branch):
        hub_api().create_branch(repo_id, branch=branch, revision=main.sha, exist_ok=True)
    staged = _stage(repo_id, branch, folder, files, message)
    main = _move_main(main, staged, folder, files, message)
    _finish(publish, branch, main, tag, message)
    return Release(repo_id=repo_id, commit=main.sha, tag=tag, changed=True)


def find_rolled_back(publish: Publish, base: Revision, manifest: Manifest) -> str | None:
    """Say before any work that `release` would refuse an artifact because a person moved `main` away from it.

    None if it would not, and if the repo cannot be read, which `check_target` tells.
    """
    try:
        claimed = None if publish.overwrite else read_release(resolve(publish.repo_id))
        if claimed is not None and claimed.artifact != manifest.digest:
            _refuse_rolled_back(publish.repo_id, tag_of(base.sha, manifest.digest), _title(base, manifest))
    except RolledBack as error:
        return str(error)
    except HubError:
        return None
    return None


def _title(base: Revision, manifest: Manifest) -> str:
    """Return the title of the commit of a release."""
    return f"Requant of {base.repo_id}@{base.sha[:7]} ({manifest.digest[:7]})"


def _refuse_rolled_back(repo_id: str, tag: str, message: str) -> None:
    """Raise RolledBack if the last commit of `main` is a rollback by which a person moved it away from this release.

    These are the releases that `main` had since the release that it was moved back to. A tag is that of the first
    commit of its release, and later ones are known by their titles.
    """
    with hub_errors(repo_id):
        api = hub_api()
        latest, *earlier = api.list_repo_commits(repo_id)
        tags = {reference.name: reference.target_commit for reference in api.list_repo_refs(repo_id).tags}
    if not latest.title.startswith(ROLLBACK_TITLE):
        return
    goal = tags.get(latest.title.removeprefix(ROLLBACK_TITLE))
    since_goal = itertools.takewhile(lambda commit: commit.commit_id != goal, earlier)
    if any(
        commit.commit_id == tags.get(tag) or message in commit.title or commit.title == f"{ROLLBACK_TITLE}{tag}"
        for commit in since_goal
    ):
        raise RolledBack(
            f"release {tag} of {repo_id} was rolled back: to have it again, requant rollback {repo_id} --to {tag}, or "
            "set publish.overwrite: true"
        )


def _propose(
    repo_id: str,
    tag: str,
    message: str,
    folder: Path,
    files: Sequence[File],
) -> Release:
    """Upload the files to the open pull request with this title, or to a new one."""
    api = hub_api()
    with hub_errors(repo_id):
        requests = api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")
        request = next((request for request in requests if request.title == message), None)
        if request is None:
            request = api.create_pull_request(repo_id, title=message, description=f"Release {tag}")
        number = request.num
    before = resolve(repo_id, f"refs/pr/{number}")
    staged = _stage(repo_id, f"refs/pr/{number}", folder, files, message)
    with hub_errors(repo_id):
        if api.get_discussion_details(repo_id, number).status == "draft":
            api.change_discussion_status(repo_id, number, "open")
    url = f"{constants.ENDPOINT}/{repo_id}/discussions/{number}"
    changed = staged.sha != before.sha
    return Release(repo_id=repo_id, commit=staged.sha, tag=tag, changed=changed, pull_request=url)


def _stage(repo_id: str, reference: str, folder: Path, files: Sequence[File], message: str) -> Revision:
    """Make a branch or pull request hold exactly these files, and compare them with the files that the Hub lists."""
    before = resolve(repo_id, reference)
    on_hub = {f.path: f for f in before.files}
    new = [f for f in files if f.path not in on_hub or not has_same_content(on_hub[f.path], f, folder)]
    operations: list[Operation] = []
    for file in new:
        operation = CommitOperationAdd(file.path, folder / file.path)
        operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # the client then does not hash the file again
        operations.append(operation)
    operations += [CommitOperationDelete(path) for path in _list_stale(before, files)]
    if operations:
        size = gigabytes(sum(file.size for file in new))
        log.info(f"uploading {len(operations)} changes, {size}, to {reference} of {repo_id}")
        with hub_errors(repo_id, reference), upload_bars():
            hub_api().create_commit(
                repo_id, operations, commit_message=message, revision=reference, parent_commit=before.sha, num_threads=4
            )
    staged = resolve(repo_id, reference)
    if not has_exactly(staged, files, folder):
        raise HubUnavailable(
            f"{reference} of {repo_id} does not hold what was uploaded: main stays as it is", repo_id=repo_id
        )
    return staged


def _move_main(main: Revision, staged: Revision, folder: Path, files: Sequence[File], message: str) -> Revision:
    """Make one commit on `main` with all files. Large files are copied by their sha256, and not uploaded again."""
    large = {file.path for file in staged.files if file.sha256 is not None}
    operations: list[Operation] = [
        CommitOperationCopy(file.path, file.path, src_revision=staged.sha)
        if file.path in large
        else CommitOperationAdd(file.path, folder / file.path)
        for file in files
    ]
    operations += [CommitOperationDelete(path) for path in _list_stale(main, files)]
    return commit_to_main(main, operations, message, lambda moved: has_exactly(moved, files, folder))


def commit_to_main(
    main: Revision, operations: Sequence[Operation], message: str, is_wanted: Callable[[Revision], bool]
) -> Revision:
    """Make a commit on `main`, whose parent must be the revision `main`. Return the new revision.

    `is_wanted` checks whether a revision already contains these changes. Raises HubError, HubUnavailable.
    """
    try:
        with hub_errors(main.repo_id, "main"):
            hub_api().create_commit(
                main.repo_id, operations, commit_message=message, revision="main", parent_commit=main.sha
            )
    except HubError:
        # The commit may have been made, and the answer was lost.
        if not is_wanted(resolve(main.repo_id)):
            raise
    moved = resolve(main.repo_id)
    if not is_wanted(moved):
        raise HubError(
            f"main of {main.repo_id} was changed by someone else meanwhile: look at it, then run again",
            repo_id=main.repo_id,
        )
    return moved


def _finish(publish: Publish, branch: str, main: Revision, tag: str, message: str) -> None:
    """Tag `main`, add the repo to the collection, and delete the branch. Steps that were done before are skipped."""
    api, repo_id = hub_api(), publish.repo_id
    with hub_errors(repo_id):
        # A tag is never moved: an existing one was made by an earlier run for the same artifact.
        api.create_tag(repo_id, tag=tag, revision=main.sha, tag_message=message, exist_ok=True)
        if publish.collection is not None:
            api.add_collection_item(publish.collection, item_id=repo_id, item_type="model", exists_ok=True)
        if branch in {reference.name for reference in api.list_repo_refs(repo_id).branches}:
            api.delete_branch(repo_id, branch=branch)


def has_exactly(
    revision: Revision, files: Iterable[File], folder: Path, ignored: Iterable[str] = (GITATTRIBUTES,)
) -> bool:
    """Check by the Hub's hashes whether a revision has exactly these files. Paths in `ignored` may be there or not."""
    wanted, skipped = {file.path: file for file in files}, set(ignored)
    on_hub = {f.path: f for f in revision.files if f.path not in skipped}
    if set(on_hub) != set(wanted):
        return False
    return all(has_same_content(on_hub[path], file, folder) for path, file in wanted.items())


def has_same_content(on_hub: HubFile, file: File, folder: Path) -> bool:
    """Compare a file on the Hub and one in `folder`: by sha256 where the Hub has one (LFS), and else by git blob id."""
    if on_hub.sha256 is not None:
        return on_hub.sha256 == file.sha256
    return on_hub.size == file.size and on_hub.blob_id == git_blob_id(folder / file.path)


def _list_pictures(revision: Revision, manifest: Manifest) -> list[str]:
    """List the pictures of the card, which are no part of the artifact."""
    return [f.path for f in revision.files if f.path.startswith(f"{PICTURES}/") and f.path not in manifest]


def _list_stale(revision: Revision, files: Iterable[File]) -> list[str]:
    """List the files of a revision that are not among `files`."""
    kept = {GITATTRIBUTES, *(file.path for file in files)}
    return [path for path in (*(f.path for f in revision.files), *revision.left_out) if path not in kept]
