"""Pull requests: a ref `refs/pr/<number>` and a record of its state. Other discussions are not supported.

As on the Hub, a pull request that was opened without a commit is a draft, which must be opened before it can be
merged; one that was opened by a commit (`create_pr`) is open. A merge is one squashed commit. Unlike on the Hub, a pull
request cannot be merged once `main` has moved.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Body

from infra.dev.hub.access import HubError, OpenRepository, ReadableRepository, WritableRepository, Writer
from infra.dev.hub.repository import PullRequest, Repository, now

router = APIRouter(prefix="/api/{kind}/{namespace}/{name}/discussions")
PAGE_ROWS = 50
JsonBody = Annotated[dict[str, Any], Body()]


@router.post("")
def create(repository: OpenRepository, writer: Writer, body: JsonBody) -> dict[str, Any]:
    if not body.get("pullRequest"):
        raise HubError(501, "The stand-in has no discussions but pull requests")
    main = repository.resolve("main")
    request = repository.open_pull_request(main, title=body["title"], author=writer.name, status="draft")
    return {"num": request.number, "pullRequest": True}


@router.get("")
def list_all(
    repository: ReadableRepository, p: int = 0, type: str = "all", status: str = "all", author: str | None = None
) -> dict[str, Any]:
    found = [
        _describe(repository, request)
        for request in repository.state.pull_requests.values()
        if type in ("all", "pull_request")
        and (status == "all" or (status == "open") == (request.status in ("open", "draft")))
        and author in (None, request.author)
    ]
    start = p * PAGE_ROWS
    return {"discussions": found[start : start + PAGE_ROWS], "count": len(found), "start": start}


@router.get("/{number}")
def details(repository: ReadableRepository, number: int) -> dict[str, Any]:
    request = _find(repository, number)
    changes = {"base": "refs/heads/main", "mergeCommitId": request.merged_as}
    comment = {
        "id": "0" * 24,
        "type": "comment",
        "createdAt": request.created,
        "author": {"name": request.author},
        "data": {"edited": False, "hidden": False, "latest": {"raw": request.description}},
    }
    return {
        **_describe(repository, request),
        "changes": changes,
        "events": [comment] if request.description else [],
        "filesWithConflicts": [],
        "diff": "",
    }


@router.post("/{number}/status")
def change_status(repository: WritableRepository, writer: Writer, number: int, body: JsonBody) -> dict[str, Any]:
    with repository.changing():
        request = _find(repository, number)
        request.status = body["status"]
    event = {"id": "0" * 24, "type": "status-change", "createdAt": now(), "data": {"status": request.status}}
    return {"newStatus": {**event, "author": {"name": writer.name}}}


@router.post("/{number}/merge")
def merge(repository: WritableRepository, writer: Writer, number: int) -> dict[str, Any]:
    """Merge a pull request into `main`, as one commit."""
    with repository.changing():
        request = _find(repository, number)
        if request.status != "open":
            raise HubError(400, f"Cannot merge: pull request {number} is {request.status}, not open.")
        if repository.resolve("main").id != request.base:
            raise HubError(409, f"Cannot merge: main has moved since pull request {number} was opened.")
        tree = repository.resolve(f"refs/pr/{number}").tree
        commit = repository.commit_tree("refs/heads/main", tree, f"{request.title} (#{number})", "", writer.name)
        request.status, request.merged_as = "merged", commit.id
    return {"commitOid": commit.id}


def _find(repository: Repository, number: int) -> PullRequest:
    request = repository.state.pull_requests.get(number)
    if request is None:
        raise HubError(404, f"Discussion {number} not found")
    return request


def _describe(repository: Repository, request: PullRequest) -> dict[str, Any]:
    return {
        "num": request.number,
        "title": request.title,
        "author": {"name": request.author},
        "createdAt": request.created,
        "status": request.status,
        "isPullRequest": True,
        "repo": {"name": repository.id, "type": repository.kind[:-1]},
    }
