"""The two calls of a commit, which may open a pull request: preupload, to ask how to upload each file, and commit."""

import base64
import json
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from fastapi.concurrency import run_in_threadpool

from infra.dev.hub.access import (
    HubError,
    HubState,
    OpenRepository,
    ResolvedCommit,
    Revision,
    Writer,
    get_writable_repository,
    repo_url,
)
from infra.dev.hub.card import check_card
from infra.dev.hub.gitattributes import goes_to_lfs, lfs_patterns
from infra.dev.hub.hub import Hub
from infra.dev.hub.repository import Commit, Repository, RevisionNotFound
from infra.dev.hub.tree import Delete, Entry, Operation, Put, apply, check_path

router = APIRouter(prefix="/api/{kind}/{namespace}/{name}")


def get_target(repository: OpenRepository, writer: Writer, create_pr: bool = False) -> Repository:
    """Return a repository that the caller may commit to; anyone who may read it may open a pull request (`create_pr`).

    Raises HubError.
    """
    return repository if create_pr else get_writable_repository(repository, writer)


Target = Annotated[Repository, Depends(get_target)]


@router.post("/preupload/{revision}")
def preupload(repository: Target, commit: ResolvedCommit, body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    """Say which files go to LFS, and what the repository holds under their names."""
    patterns = lfs_patterns(repository, commit.tree)
    files = []
    for file in body["files"]:
        held = commit.tree.get(file["path"])
        mode = "lfs" if goes_to_lfs(file["path"], file["size"], patterns) else "regular"
        oid = held.etag if held else None
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": files}


@router.post("/commit/{revision}")
async def commit(
    request: Request, hub: HubState, repository: Target, revision: Revision, writer: Writer, create_pr: bool = False
) -> dict[str, Any]:
    """Commit the operations of a body of JSON lines to a branch, a pull request, or a new pull request."""
    lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
    await run_in_threadpool(_take_from_xet, hub, repository, lines)
    commit = _commit_to_new_pull_request if create_pr else _commit
    ref, made = await run_in_threadpool(commit, repository, revision, writer.name, lines)
    address = repo_url(request, repository)
    answer = {"success": True, "hookOutput": "", "commitOid": made.id, "commitUrl": f"{address}/commit/{made.id}"}
    return answer | ({"pullRequestUrl": f"{address}/discussions/{ref.rpartition('/')[2]}"} if create_pr else {})


def _commit(repository: Repository, revision: str, author: str, lines: list[dict[str, Any]]) -> tuple[str, Commit]:
    """Commit to a branch or pull request. Returns its full name and the commit."""
    header = _read_header(lines)
    ref = repository.full_ref(revision)
    if ref is None or ref.startswith("refs/tags/"):
        raise RevisionNotFound(revision)
    made = repository.commit(
        ref,
        _read_operations(repository, lines),
        title=header["summary"],
        description=header.get("description", ""),
        author=author,
        parent=header.get("parentCommit"),
    )
    return ref, made


def _commit_to_new_pull_request(
    repository: Repository, revision: str, author: str, lines: list[dict[str, Any]]
) -> tuple[str, Commit]:
    """Open a pull request with one commit behind the parent that the header names, otherwise behind the branch.

    As on the Hub, `main` may have moved since that parent. Returns the pull request's ref and the commit.
    """
    header, operations = _read_header(lines), _read_operations(repository, lines)
    if repository.full_ref(revision) != "refs/heads/main":
        raise HubError(400, f"A pull request changes main, not {revision}")
    base = repository.resolve(header.get("parentCommit") or revision)
    title, description = header["summary"], header.get("description", "")
    with repository.lock:
        tree = apply(base.tree, operations)  # Raises before anything is opened.
        request = repository.open_pull_request(base, title=title, author=author, description=description)
        ref = f"refs/pr/{request.number}"
        return ref, repository.commit_tree(ref, tree, title, description, author)


def _take_from_xet(hub: Hub, repository: Repository, lines: list[dict[str, Any]]) -> None:
    """Make objects of the large files that the commit names and that were uploaded through Xet. Raises BrokenUpload."""
    for oid in {line["value"]["oid"] for line in lines if line["key"] == "lfsFile"}:
        file = None if repository.lfs_entry(oid) else hub.xet.find_sha256(oid)
        if file is not None:
            temporary = hub.temporary()
            try:
                hub.xet.rebuild(file, temporary)
                repository.adopt_lfs(temporary, Entry.lfs(oid, file.size))
            finally:
                temporary.unlink(missing_ok=True)


def _read_header(lines: list[dict[str, Any]]) -> dict[str, Any]:
    header: dict[str, Any] | None = next((line["value"] for line in lines if line["key"] == "header"), None)
    if header is None:
        raise HubError(400, "The commit has no header")
    return header


def _read_operations(repository: Repository, lines: list[dict[str, Any]]) -> list[Operation]:
    return [_read_operation(repository, line) for line in lines if line["key"] != "header"]


def _read_operation(repository: Repository, line: dict[str, Any]) -> Operation:
    """Read one line of a commit, and store the content that it carries."""
    key, value = line["key"], line["value"]
    path = check_path(value["path"].rstrip("/"))
    if key == "file":
        content = base64.b64decode(value["content"], validate=True)
        if path == "README.md" and (errors := check_card(content.decode("utf-8", "replace"))[0]):
            raise HubError(400, f"Invalid metadata in README.md: {errors[0]}")
        return Put(path, repository.put_blob(content))
    if key == "lfsFile":
        return Put(path, _find_large_file(repository, value))
    if key in ("deletedFile", "deletedFolder"):
        return Delete(path, folder=key == "deletedFolder")
    raise HubError(400, f"Unknown operation in the commit: {key}")


def _find_large_file(repository: Repository, value: dict[str, Any]) -> Entry:
    """Return the large file that a commit names. A copy names it without its size."""
    entry = repository.lfs_entry(value["oid"])
    if entry is None:
        raise HubError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
    if value.get("size", entry.size) != entry.size:
        raise HubError(400, f"LFS object {value['oid']} has {entry.size} bytes")
    return entry
