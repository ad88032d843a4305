"""The two calls that make a commit: preupload (what is each file?) and commit."""

import base64
import json
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.concurrency import run_in_threadpool

from infra.dev.hub.access import HubError, OpenRepository, ResolvedCommit, Revision, Writer, repo_url
from infra.dev.hub.card import check_card
from infra.dev.hub.discussions import open_discussion
from infra.dev.hub.gitattributes import goes_to_lfs, lfs_patterns
from infra.dev.hub.hub import User
from infra.dev.hub.repository import Repository, RevisionNotFound
from infra.dev.hub.tree import Delete, Entry, Operation, Put, apply, check_path

router = APIRouter(prefix="/api/{kind}/{namespace}/{name}")


@router.post("/preupload/{revision}")
def preupload(
    repository: OpenRepository,
    commit: ResolvedCommit,
    writer: Writer,
    body: Annotated[dict[str, Any], Body()],
    create_pr: bool = False,
) -> dict[str, Any]:
    """Say which files go to LFS, and what the repository holds under their names."""
    _check_may_commit(repository, writer, create_pr)
    tree = repository.tree(commit)
    patterns = lfs_patterns(repository, tree)
    files = []
    for file in body["files"]:
        held = tree.get(file["path"])
        mode = "lfs" if goes_to_lfs(file["path"], file["size"], patterns) else "regular"
        oid = held.etag if held else None
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": files}


@router.post("/commit/{revision}")
async def commit(
    request: Request,
    repository: OpenRepository,
    revision: Revision,
    writer: Writer,
    create_pr: bool = False,
) -> dict[str, Any]:
    """Make a commit from lines of JSON: on a branch or pull request, or as a new pull request."""
    _check_may_commit(repository, writer, create_pr)
    lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
    header = next((line["value"] for line in lines if line["key"] == "header"), None)
    if header is None:
        raise HubError(400, "The commit has no header")
    return await run_in_threadpool(_commit, request, repository, revision, writer, create_pr, header, lines)


def _commit(
    request: Request,
    repository: Repository,
    revision: str,
    writer: User,
    create_pr: bool,
    header: dict[str, Any],
    lines: list[dict[str, Any]],
) -> dict[str, Any]:
    title, description = header["summary"], header.get("description", "")
    parent = header.get("parentCommit")
    operations = [_operation(repository, line) for line in lines if line["key"] != "header"]
    page = repo_url(request, repository)
    answer: dict[str, Any] = {"success": True, "hookOutput": ""}
    if create_pr:
        with repository.lock:
            base = repository.resolve(parent or revision)
            tree = apply(repository.tree(base), operations)
            commit = repository.store_commit((base.id,), tree, title, description, writer.name)
            discussion = open_discussion(repository, writer, title, description, base=base, head=commit, status="open")
        answer["pullRequestUrl"] = f"{page}/discussions/{discussion['num']}"
    else:
        commit = repository.commit(
            _ref_to_commit_to(repository, revision),
            operations,
            title=title,
            description=description,
            author=writer.name,
            parent=parent,
        )
    return {**answer, "commitOid": commit.id, "commitUrl": f"{page}/commit/{commit.id}"}


def _check_may_commit(repository: Repository, writer: User, create_pr: bool) -> None:
    if not create_pr and not writer.owns(repository.id):
        message = f"You don't have the rights to write to {repository.id}; open a pull request."
        raise HubError(403, message)


def _ref_to_commit_to(repository: Repository, revision: str) -> str:
    ref = repository.full_ref(revision)
    if ref is None or ref.startswith("refs/tags/"):
        raise RevisionNotFound(revision)
    return ref


def _operation(repository: Repository, line: dict[str, Any]) -> Operation:
    """Read one line of a commit, and keep the content that it carries."""
    key, value = line["key"], line["value"]
    path = check_path(value["path"].rstrip("/"))
    if key == "file":
        content = base64.b64decode(value["content"], validate=True)
        if path == "README.md" and (errors := check_card(content.decode("utf-8", "replace"))[0]):
            raise HubError(400, f"Invalid metadata in README.md: {errors[0]}")
        return Put(path, repository.put_blob(content))
    if key == "lfsFile":
        return Put(path, _large_file(repository, value))
    if key in ("deletedFile", "deletedFolder"):
        return Delete(path, folder=key == "deletedFolder")
    raise HubError(400, f"Unknown operation in the commit: {key}")


def _large_file(repository: Repository, value: dict[str, Any]) -> Entry:
    """The large file that a commit names. A copy names it without its size."""
    entry = repository.lfs_entry(value["oid"])
    if entry is None:
        raise HubError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
    if value.get("size", entry.size) != entry.size:
        raise HubError(400, f"LFS object {value['oid']} has {entry.size} bytes")
    return entry
