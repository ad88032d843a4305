"""Pull requests: a ref `refs/pr/<number>` and a record of what became of it.

As on the Hub, a pull request that was opened without a commit is a draft, which must be opened
before it can be merged, and a merge is one squashed commit.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body

from infra.dev.hub.access import HubError, OpenRepository, ReadableRepository, WritableRepository, Writer
from infra.dev.hub.hub import User
from infra.dev.hub.repository import Commit, Repository, now
from infra.dev.hub.tree import Entry, changed_paths, merge

router = APIRouter(prefix="/api/{kind}/{namespace}/{name}/discussions")
DISCUSSIONS_PAGE = 50
Discussion = dict[str, Any]


def open_discussion(
    repository: Repository,
    author: User,
    title: str,
    description: str,
    *,
    base: Commit | None = None,
    head: Commit | None = None,
    status: str,
) -> Discussion:
    """Start a discussion; with a `base` and a `head`, a pull request."""
    with repository.lock:
        number = 1 + max([0, *_numbers(repository), *map(int, repository.refs("pr"))])
        if head:
            repository.create_ref(f"refs/pr/{number}", head.id)
        discussion: Discussion = {
            "num": number,
            "title": title,
            "author": {"name": author.name},
            "createdAt": now(),
            "status": status,
            "isPullRequest": base is not None,
            "baseCommit": base.id if base else None,
            "mergeCommitId": None,
            "events": [],
        }
        comment = {"edited": False, "hidden": False, "latest": {"raw": description}}
        _add_event(discussion, author, "comment", comment)
        _save(repository, discussion)
        return discussion


@router.post("")
def create(repository: OpenRepository, writer: Writer, body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    main = repository.resolve("main") if body.get("pullRequest") else None
    discussion = open_discussion(
        repository,
        writer,
        body["title"],
        body.get("description", ""),
        base=main,
        head=main,
        status="draft" if main else "open",
    )
    return {"num": discussion["num"], "pullRequest": discussion["isPullRequest"]}


@router.get("")
def list_all(
    repository: ReadableRepository,
    p: int = 0,
    type: str = "all",
    status: str = "all",
    author: str | None = None,
) -> dict[str, Any]:
    found = [
        discussion
        for discussion in (_load(repository, number) for number in _numbers(repository))
        if type in ("all", "pull_request" if discussion["isPullRequest"] else "discussion")
        and (status == "all" or (status == "open") == (discussion["status"] in ("open", "draft")))
        and author in (None, discussion["author"]["name"])
    ]
    start = p * DISCUSSIONS_PAGE
    page = [_described(repository, each) for each in found[start : start + DISCUSSIONS_PAGE]]
    return {"discussions": page, "count": len(found), "start": start}


@router.get("/{number}")
def details(repository: ReadableRepository, number: int) -> dict[str, Any]:
    discussion = _load(repository, number)
    described = _described(repository, discussion)
    if discussion["isPullRequest"]:
        base = repository.load_commit(discussion["baseCommit"])
        head = repository.resolve(f"refs/pr/{number}")
        _, conflicts = _merge(repository, discussion)
        changes = {"base": "refs/heads/main", "mergeCommitId": discussion["mergeCommitId"]}
        paths = changed_paths(repository.tree(base), repository.tree(head))
        described |= {
            "changes": changes,
            "filesWithConflicts": [] if discussion["status"] == "merged" else conflicts,
            "diff": "".join(f"diff --git a/{path} b/{path}\n" for path in paths),
        }
    return described


@router.post("/{number}/status")
def change_status(
    repository: WritableRepository,
    writer: Writer,
    number: int,
    body: Annotated[dict[str, Any], Body()],
) -> dict[str, Any]:
    with repository.lock:
        discussion = _load(repository, number)
        discussion["status"] = body["status"]
        event = _add_event(discussion, writer, "status-change", {"status": body["status"]})
        _save(repository, discussion)
    return {"newStatus": event}


@router.post("/{number}/merge")
def merge_pull_request(repository: WritableRepository, writer: Writer, number: int) -> dict[str, Any]:
    """Bring a pull request into `main`, as one commit."""
    with repository.lock:
        discussion = _load(repository, number)
        if not discussion["isPullRequest"] or discussion["status"] != "open":
            message = f"Cannot merge: discussion {number} is {discussion['status']}, not open."
            raise HubError(400, message)
        tree, conflicts = _merge(repository, discussion)
        if conflicts:
            raise HubError(409, f"Cannot merge: conflicts in {', '.join(conflicts)}")
        commit = repository.resolve("main")
        # The trees are equal if the stand-in was killed after this commit, before the record of it.
        if tree != repository.tree(commit):
            title = f"{discussion['title']} (#{number})"
            commit = repository.store_commit((commit.id,), tree, title, "", writer.name)
            repository.move_ref("refs/heads/main", commit)
        discussion |= {"status": "merged", "mergeCommitId": commit.id}
        _add_event(discussion, writer, "status-change", {"status": "merged"})
        _save(repository, discussion)
    return {"commitOid": commit.id}


def _merge(repository: Repository, discussion: Discussion) -> tuple[dict[str, Entry], list[str]]:
    base = repository.load_commit(discussion["baseCommit"])
    head = repository.resolve(f"refs/pr/{discussion['num']}")
    main = repository.resolve("main")
    return merge(repository.tree(base), repository.tree(main), repository.tree(head))


def _described(repository: Repository, discussion: Discussion) -> dict[str, Any]:
    return {**discussion, "repo": {"name": repository.id, "type": repository.kind[:-1]}}


def _add_event(discussion: Discussion, author: User, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    event = {
        "id": f"{discussion['num']:016x}{len(discussion['events']):08x}",
        "type": kind,
        "createdAt": now(),
        "author": {"name": author.name},
        "data": data,
    }
    discussion["events"].append(event)
    return event


def _numbers(repository: Repository) -> list[int]:
    folder = repository.folder / "discussions"
    return sorted(int(path.name) for path in folder.iterdir()) if folder.is_dir() else []


def _load(repository: Repository, number: int) -> Discussion:
    if number not in _numbers(repository):
        raise HubError(404, f"Discussion {number} not found")
    discussion: Discussion = json.loads(_path(repository, number).read_bytes())
    return discussion


def _save(repository: Repository, discussion: Discussion) -> None:
    path = _path(repository, discussion["num"])
    repository.durable.write(path, json.dumps(discussion).encode())


def _path(repository: Repository, number: int) -> Path:
    return repository.folder / "discussions" / str(number)
