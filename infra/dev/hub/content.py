"""What a revision holds: listings, and the files themselves."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from infra.dev.hub.access import FilePath, HubError, HubState, OpenRepository, ReadableRepository, ResolvedCommit
from infra.dev.hub.paging import one_page
from infra.dev.hub.repository import Commit, Repository
from infra.dev.hub.tree import Entry, Tree, folder_id, folders

router = APIRouter()
EXPANDED_PAGE = 50
LARGEST_RANGE = 2**24


class BlobResponse(FileResponse):
    """Streams an object, or the range of it that was asked for."""

    chunk_size = 2**20


@router.api_route("/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
@router.api_route("/{kind}/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
def resolve(request: Request, repository: OpenRepository, commit: ResolvedCommit, path: FilePath) -> Response:
    entry = repository.tree(commit).get(path)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", commit=commit.id)
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{entry.etag}"'}
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    media_type = "application/octet-stream" if entry.sha256 else "text/plain; charset=utf-8"
    stored = repository.object_path(entry)
    if stored.stat().st_size < entry.size:
        return _from_header(request, stored, entry.size, headers)
    return BlobResponse(stored, headers=headers, media_type=media_type)


def _from_header(request: Request, stored: Path, size: int, headers: dict[str, str]) -> Response:
    """A range of a file of which only the header is kept: the rest are zeros, and nobody gets it whole."""
    headers |= {"Accept-Ranges": "bytes", "Content-Length": str(size)}
    if request.method == "HEAD":
        return Response(headers=headers)
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    if match is None:
        raise HubError(400, "Only the header of this file is here: ask for a range of it")
    begin, end = int(match[1]), min(int(match[2]) + 1, size)
    if not begin < end <= begin + LARGEST_RANGE:
        raise HubError(416, f"Ranges of at most {LARGEST_RANGE} bytes of this file are served")
    kept = stored.read_bytes()[begin:end]
    headers |= {"Content-Length": str(end - begin), "Content-Range": f"bytes {begin}-{end - 1}/{size}"}
    return Response(kept.ljust(end - begin, b"\0"), 206, headers, "application/octet-stream")


@router.get("/api/{kind}/{namespace}/{name}/tree/{revision}")
def list_root(
    request: Request,
    hub: HubState,
    repository: ReadableRepository,
    commit: ResolvedCommit,
    recursive: bool = False,
    expand: bool = False,
) -> JSONResponse:
    return list_folder(request, hub, repository, commit, "", recursive, expand)


@router.get("/api/{kind}/{namespace}/{name}/tree/{revision}/{path:path}")
def list_folder(
    request: Request,
    hub: HubState,
    repository: ReadableRepository,
    commit: ResolvedCommit,
    path: FilePath,
    recursive: bool = False,
    expand: bool = False,
) -> JSONResponse:
    tree = repository.tree(commit)
    prefix = f"{path}/" if path else ""
    found = [
        name
        for name in sorted(tree.keys() | folders(tree))
        if name.startswith(prefix) and (recursive or "/" not in name[len(prefix) :])
    ]
    if path and not found:
        raise HubError(404, f"{path} does not exist", "EntryNotFound", commit=commit.id)
    size = min(hub.limits.tree_page, EXPANDED_PAGE) if expand else hub.limits.tree_page
    page, headers = one_page(request, found, size)
    return JSONResponse(_describe(repository, commit, page, expand), headers=headers)


@router.post("/api/{kind}/{namespace}/{name}/paths-info/{revision}")
async def paths_info(request: Request, repository: ReadableRepository, commit: ResolvedCommit) -> list[dict[str, Any]]:
    """Describe the paths that exist among those in a form of `paths` and `expand`."""
    form = parse_qs((await request.body()).decode())
    tree = repository.tree(commit)
    existing = tree.keys() | folders(tree)
    found = [path for path in form.get("paths", []) if path in existing]
    return _describe(repository, commit, found, form.get("expand") in (["true"], ["True"]))


def _describe(repository: Repository, commit: Commit, paths: list[str], expand: bool) -> list[dict[str, Any]]:
    """Files and folders as the Hub lists them; with `expand`, also who changed them last."""
    tree = repository.tree(commit)
    rows = [_describe_path(tree, path) for path in paths]
    if expand:
        changes = _last_changes(repository, commit, paths)
        for row in rows:
            last = changes[row["path"]]
            row["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
    return rows


def _describe_path(tree: Tree, path: str) -> dict[str, Any]:
    entry = tree.get(path)
    if entry is None:
        return {"type": "directory", "path": path, "oid": folder_id(tree, path), "size": 0}
    row: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    if entry.sha256:
        row["lfs"] = {
            "oid": entry.sha256,
            "size": entry.size,
            "pointerSize": entry.pointer_size,
        }
    return row


def _last_changes(repository: Repository, commit: Commit, paths: list[str]) -> dict[str, Commit]:
    """The commit that last changed each path."""
    changes: dict[str, Commit] = {}
    tree: Tree = repository.tree(commit)
    for step in repository.history(commit):
        before: Tree = repository.tree(repository.load_commit(step.parents[0])) if step.parents else {}
        for path in paths:
            if path not in changes and _state_of(tree, path) != _state_of(before, path):
                changes[path] = step
        tree = before
    return changes


def _state_of(tree: Tree, path: str) -> Entry | str:
    return tree.get(path) or folder_id(tree, path)
