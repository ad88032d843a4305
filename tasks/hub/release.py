"""Staged publishing: upload to a branch, verify what the Hub says it holds, move `main` in one commit, tag.

Killed at any step, the next call goes on: the Hub keeps what was uploaded, `main` is the old model or the new one
and never a part of it, and an artifact that `main` already holds makes no commit.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import LocalTokenNotFoundError

from tasks.artifact import File, Manifest, git_blob_id
from tasks.errors import HubError, HubUnavailable
from tasks.hub.client import hub_api, hub_errors
from tasks.hub.revision import HubFile, Revision, resolve
from tasks.pictures import FOLDER

CARD = "README.md"
HUBS_OWN = {CARD, ".gitattributes"}
log = logging.getLogger(__name__)
Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


@dataclass(frozen=True)
class Release:
    """What is on the Hub now, and whether this call changed it."""

    repo_id: str
    commit: str
    tag: str
    changed: bool

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.repo_id}"


def release(
    repo_id: str,
    folder: Path,
    manifest: Manifest,
    tag: str,
    message: str,
    *,
    beside: Sequence[str] = (CARD,),
    private: bool,
    say: Callable[[str], None],
) -> Release:
    """Make `main` of `repo_id` hold exactly `manifest` and what lies `beside` it, the card and its pictures.

    All of them are files in `folder`. What lies beside is not compared: it goes with an artifact that is new there.
    Raises HubError (no right to write, changed by someone else meanwhile) or HubUnavailable.
    """
    api = hub_api()
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
    main = resolve(repo_id)
    branch = f"requant-{manifest.digest[:12]}"
    if holds(main, manifest, folder):
        say(f"{repo_id} already holds this artifact")
        changed = False
    else:
        _check_ours(main)
        staged = _stage(repo_id, branch, main, folder, manifest, beside, message, say)
        main = _move_main(repo_id, main, staged, folder, manifest, beside, message)
        changed = True
    with hub_errors(repo_id):
        # A tag is never moved: if it is there, an earlier run of this artifact got that far.
        api.create_tag(repo_id, tag=tag, revision=main.sha, tag_message=message, exist_ok=True)
        for reference in api.list_repo_refs(repo_id).branches:
            if reference.name == branch:
                api.delete_branch(repo_id, branch=branch)
    return Release(repo_id, main.sha, tag, changed)


def check_target(repo_id: str, *, private: bool) -> None:
    """Find out before any work whether this account may write there. Raises HubError."""
    api = hub_api()
    with hub_errors(repo_id):
        try:
            account = api.whoami()
        except LocalTokenNotFoundError as error:
            raise HubError(f"publishing to {repo_id} needs HF_TOKEN: set it to a token that may write there") from error
        if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise HubError(f"HF_TOKEN may only read: set it to a token that may write to {repo_id}")
        names = {account.get("name"), *(org.get("name") for org in account.get("orgs") or [])}
        if "/" in repo_id and repo_id.split("/")[0] not in names:
            # Not every token lists what it may write to: the Hub itself must say.
            api.create_repo(repo_id, private=private, exist_ok=True)


def _check_ours(main: Revision) -> None:
    """Refuse to replace a model that Requant did not make."""
    if not any(file.path.endswith(".safetensors") for file in main.files):
        return
    with hub_errors(main.repo_id, main.sha), tempfile.TemporaryDirectory() as folder:
        has_card = any(file.path == CARD for file in main.files)
        path = hf_hub_download(main.repo_id, CARD, revision=main.sha, local_dir=folder) if has_card else None
        card = Path(path).read_text(encoding="utf-8", errors="replace") if path else ""
    if "quantized_by: requant" not in card:
        raise HubError(f"{main.repo_id} holds a model that Requant did not make: publish to a repo of its own")


def _stage(
    repo_id: str,
    branch: str,
    main: Revision,
    folder: Path,
    manifest: Manifest,
    beside: Sequence[str],
    message: str,
    say: Callable[[str], None],
) -> Revision:
    """Bring branch `branch` to exactly the manifest and what lies beside it, and check what the Hub says it holds."""
    api = hub_api()
    with hub_errors(repo_id, branch):
        api.create_branch(repo_id, branch=branch, revision=main.sha, exist_ok=True)
    before = resolve(repo_id, branch)
    operations: list[Operation] = [CommitOperationAdd(path, (folder / path).read_bytes()) for path in beside]
    there = {f.path: f for f in before.files}
    for file in manifest.files:
        if file.path not in there or not same(there[file.path], file, folder):
            operation = CommitOperationAdd(file.path, folder / file.path)
            operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # known: the client need not hash it again
            operations.append(operation)
    operations += [CommitOperationDelete(path) for path in _stale(before, manifest, beside)]
    say(f"uploading {len(operations)} changes to branch {branch} of {repo_id}")
    with hub_errors(repo_id, branch):
        api.create_commit(
            repo_id, operations, commit_message=message, revision=branch, parent_commit=before.sha, num_threads=4
        )
    staged = resolve(repo_id, branch)
    if not holds(staged, manifest, folder):
        raise HubUnavailable(f"branch {branch} of {repo_id} does not hold what was uploaded: {main.sha[:7]} stays main")
    return staged


def _move_main(
    repo_id: str,
    main: Revision,
    staged: Revision,
    folder: Path,
    manifest: Manifest,
    beside: Sequence[str],
    message: str,
) -> Revision:
    """One commit on main with everything; large files are named by their sha256 and not sent again."""
    operations: list[Operation] = []
    for file in staged.files:
        if file.path in manifest and file.sha256 is not None:
            operations.append(CommitOperationCopy(file.path, file.path, src_revision=staged.sha))
        elif file.path in manifest or file.path in beside:
            operations.append(CommitOperationAdd(file.path, (folder / file.path).read_bytes()))
    operations += [CommitOperationDelete(path) for path in _stale(main, manifest, beside)]
    try:
        with hub_errors(repo_id, "main"):
            hub_api().create_commit(
                repo_id, operations, commit_message=message, revision="main", parent_commit=main.sha
            )
    except HubError:
        # The answer may have been lost after the commit was made.
        if not holds(resolve(repo_id), manifest, folder):
            raise
    moved = resolve(repo_id)
    if not holds(moved, manifest, folder):
        raise HubError(f"main of {repo_id} was changed by someone else meanwhile: look at it, then run again")
    return moved


def holds(revision: Revision, manifest: Manifest, folder: Path) -> bool:
    """Whether a revision has exactly the manifest's files, by the Hub's hashes, card and pictures aside."""
    aside = {f.path for f in revision.files if f.path.startswith(f"{FOLDER}/") and f.path not in manifest} | HUBS_OWN
    there = {f.path: f for f in revision.files if f.path not in aside}
    if set(there) != {f.path for f in manifest.files}:
        return False
    return all(same(there[file.path], file, folder) for file in manifest.files)


def same(theirs: HubFile, ours: File, folder: Path) -> bool:
    """Compare by sha256 where the Hub has one (LFS), else by git blob id."""
    if theirs.sha256 is not None:
        return theirs.sha256 == ours.sha256
    return theirs.size == ours.size and theirs.blob_id == git_blob_id(folder / ours.path)


def _stale(revision: Revision, manifest: Manifest, beside: Sequence[str] = ()) -> list[str]:
    kept = {*HUBS_OWN, *beside}
    return [f.path for f in revision.files if f.path not in manifest and f.path not in kept]
