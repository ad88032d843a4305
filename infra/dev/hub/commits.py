"""The two calls of a commit: preupload, which says how to upload each file, and the commit itself."""

import base64
import json
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from fastapi.concurrency import run_in_threadpool

from infra.dev.hub.access import HubError, ResolvedCommit, Revision, WritableRepository, Writer, repo_url
from infra.dev.hub.card import check_card
from infra.dev.hub.gitattributes import goes_to_lfs, lfs_patterns
from infra.dev.hub.repository import Commit, Repository, RevisionNotFound
from infra.dev.hub.tree import Delete, Entry, Operation, Put, check_path


def refuse_new_pull_request(create_pr: bool = False) -> None:
    """Refuse a commit that opens a pull request: the stand-in knows only those that are opened as drafts."""
    if create_pr:
        raise HubError(501, "The stand-in opens no pull request with a commit: use create_pull_request")


router = APIRouter(prefix="/api/{kind}/{namespace}/{name}", dependencies=[Depends(refuse_new_pull_request)])


@router.post("/preupload/{revision}")
def preupload(
    repository: WritableRepository, commit: ResolvedCommit, body: Annotated[dict[str, Any], Body()]
) -> dict[str, Any]:
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
    request: Request, repository: WritableRepository, revision: Revision, writer: Writer
) -> dict[str, Any]:
    """Commit the operations of a body of JSON lines to a branch or pull request."""
    lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
    made = await run_in_threadpool(_commit, repository, revision, writer.name, lines)
    url = f"{repo_url(request, repository)}/commit/{made.id}"
    return {"success": True, "hookOutput": "", "commitOid": made.id, "commitUrl": url}


def _commit(repository: Repository, revision: str, author: str, lines: list[dict[str, Any]]) -> Commit:
    header = next((line["value"] for line in lines if line["key"] == "header"), None)
    if header is None:
        raise HubError(400, "The commit has no header")
    ref = repository.full_ref(revision)
    if ref is None or ref.startswith("refs/tags/"):
        raise RevisionNotFound(revision)
    return repository.commit(
        ref,
        [_read_operation(repository, line) for line in lines if line["key"] != "header"],
        title=header["summary"],
        description=header.get("description", ""),
        author=author,
        parent=header.get("parentCommit"),
    )


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
