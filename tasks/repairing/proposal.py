"""Pull requests on the Hub: one commit with all changes, opened at most once."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, constants, get_token

from requant.tasks.artifact import File
from requant.tasks.errors import HubError, HubUnavailable, RecipeError
from requant.tasks.hub.client import hub_api, hub_errors
from requant.tasks.hub.release import Operation, has_same_content
from requant.tasks.hub.revision import Revision, resolve

MAX_LISTED = 1000  # open pull requests that are looked through
MAX_COMPARED = 20  # those of the same title whose files are compared
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """What a pull request changes: it adds or replaces `files` of `folder`, copies files of `main`, and removes some.

    `copies` has the path of each copied file by that of its copy. Nothing of a copy is uploaded.
    """

    folder: Path
    files: Sequence[File]
    copies: Mapping[str, str]
    removed: Sequence[str]

    def operations(self, main: Revision) -> list[Operation]:
        """Return the operations of a commit. Files are uploaded from the folder."""
        additions = []
        for file in self.files:
            addition = CommitOperationAdd(file.path, self.folder / file.path)
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # the client then does not hash the file again
            additions.append(addition)
        copies = (CommitOperationCopy(old, new, src_revision=main.sha) for new, old in self.copies.items())
        return [*additions, *copies, *(CommitOperationDelete(path) for path in self.removed)]

    def is_in(self, proposed: Revision, main: Revision) -> bool:
        """Check by the Hub's hashes whether a revision has these changes. Other files may be as they like."""
        there = {file.path: file for file in proposed.files}
        on_main = {file.path: file for file in main.files}
        added = all(file.path in there and has_same_content(there[file.path], file, self.folder) for file in self.files)
        copied = all(
            new in there and (there[new].blob_id, there[new].sha256) == (on_main[old].blob_id, on_main[old].sha256)
            for new, old in self.copies.items()
        )
        return added and copied and not any(path in there for path in self.removed)


def check_account(repo_id: str) -> str:
    """Return the name of the token's account, which is to open a pull request.

    Raises RecipeError without a token, HubError if it may only read, HubUnavailable.
    """
    if get_token() is None:
        raise RecipeError(
            f"--pull-request needs a token: set HF_TOKEN to one that may open pull requests in {repo_id}, or leave the "
            "option out, and nothing is sent"
        )
    with _expected_answer(repo_id):
        account = hub_api().whoami()
        if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise HubError(f"HF_TOKEN may only read: set it to a token that may write to {repo_id}", repo_id=repo_id)
        return str(account["name"])


@dataclass(frozen=True)
class Proposal:
    """An open pull request, and whether this call opened it."""

    url: str
    opened: bool


def propose(main: Revision, change: Change, title: str, description: str, account: str) -> Proposal:
    """Open a pull request with a change of `main`, unless one with this title and these changes is open already.

    It starts from the revision `main`. Nothing is visible of a call that was interrupted before its one commit, and a
    repetition uploads only what the Hub does not have yet.

    Raises HubError (no access, `main` has moved since, or a pull request of this account and title with other changes
    is open) or HubUnavailable.
    """
    repo_id = main.repo_id
    found = _find_open(main, change, title, account)
    if found is not None:
        return Proposal(found, opened=False)
    check_is_main(main)
    upload_bytes = sum(file.size for file in change.files)
    log.info(f"uploading {len(change.files)} files, {upload_bytes:,} bytes, for a pull request to {repo_id}")
    try:
        with _expected_answer(repo_id):
            made = hub_api().create_commit(
                repo_id,
                change.operations(main),
                commit_message=title,
                commit_description=description,
                create_pr=True,
                parent_commit=main.sha,
                num_threads=4,
            )
            number = made.pr_num
    except HubError:
        # The pull request may have been opened, and the answer was lost.
        found = _find_open(main, change, title, account)
        if found is None:
            raise
        return Proposal(found, opened=True)
    if number is None or not change.is_in(resolve(repo_id, f"refs/pr/{number}"), main):
        raise HubUnavailable(
            f"the pull request of {repo_id} does not hold what was uploaded ({_address(repo_id, number)}): close it, "
            "then run again",
            repo_id=repo_id,
        )
    return Proposal(_address(repo_id, number), opened=True)


def check_is_main(revision: Revision) -> None:
    """Check that a revision is the one of `main`. Raises HubError, HubUnavailable."""
    now = resolve(revision.repo_id)
    if now.sha != revision.sha:
        raise HubError(
            f"a pull request changes main of {revision.repo_id}, which is at {now.sha}, and {revision.sha} was "
            "inspected: run again without a revision",
            repo_id=revision.repo_id,
        )


def _find_open(main: Revision, change: Change, title: str, account: str) -> str | None:
    """Return the address of an open pull request of this title with these changes, whoever opened it; None without one.

    Raises HubError if `account` has one open with other changes, HubUnavailable.
    """
    repo_id = main.repo_id
    with _expected_answer(repo_id):
        requests = hub_api().get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")
        same_title = [
            (int(request.num), request.author)
            for request in itertools.islice(requests, MAX_LISTED)
            if request.title == title and request.is_pull_request
        ]
    # Those of the account come first: others may open many of the same title.
    ordered = sorted(same_title, key=lambda request: (request[1] != account, request[0]))[:MAX_COMPARED]
    for number, _ in ordered:
        if change.is_in(resolve(repo_id, f"refs/pr/{number}"), main):
            return _address(repo_id, number)
    if ordered and ordered[0][1] == account:
        raise HubError(
            f"{_address(repo_id, ordered[0][0])} of {account} is open with other changes: merge or close it, then run "
            "again",
            repo_id=repo_id,
        )
    return None


def _address(repo_id: str, number: int | None) -> str:
    return f"{constants.ENDPOINT}/{repo_id}/discussions" + (f"/{number}" if number is not None else "")


@contextlib.contextmanager
def _expected_answer(repo_id: str) -> Iterator[None]:
    """Raise HubError or HubUnavailable for failures of the Hub, and for an answer without what the client reads."""
    try:
        with hub_errors(repo_id):
            yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise HubError(
            f"the Hub at {constants.ENDPOINT} does not answer as documented for {repo_id} ({error!r:.200}): look at "
            "the repo's pull requests, then run again",
            repo_id=repo_id,
        ) from error
