"""The content of a revision: listings, and the files themselves."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from infra.dev.hub.access import FilePath, HubError, HubState, OpenRepository, ResolvedCommit
from infra.dev.hub.hub import Hub
from infra.dev.hub.paging import one_page
from infra.dev.hub.tree import Entry, Tree, folder_id, folders
from infra.dev.hub.xet import XetFile

router = APIRouter()
MAX_RANGE_BYTES = 2**24


class BlobResponse(FileResponse):
    """A stream of an object, or of the range that the request names."""

    chunk_size = 2**20


@router.api_route("/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
@router.api_route("/{kind}/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
def resolve(
    request: Request, hub: HubState, repository: OpenRepository, commit: ResolvedCommit, path: FilePath
) -> Response:
    entry = commit.tree.get(path)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", commit=commit.id)
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{entry.etag}"'}
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    if xet := _find_in_xet(hub, entry):
        route = f"{request.base_url}api/{repository.kind}/{repository.id}/xet-read-token/{commit.id}"
        headers |= {"X-Xet-Hash": xet.hash, "X-Xet-Refresh-Route": route}
    media_type = "application/octet-stream" if entry.sha256 else "text/plain; charset=utf-8"
    stored = repository.object_path(entry)
    if stored.stat().st_size < entry.size:
        return _from_header(request, stored, entry.size, headers)
    return BlobResponse(stored, headers=headers, media_type=media_type)


def _find_in_xet(hub: Hub, entry: Entry) -> XetFile | None:
    return hub.xet.find_sha256(entry.sha256) if entry.sha256 and hub.xet_settings.enabled else None


def _from_header(request: Request, stored: Path, size: int, headers: dict[str, str]) -> Response:
    """Answer with a range of a file of which only the header is stored: zeros follow. Refuse to send the whole file."""
    headers |= {"Accept-Ranges": "bytes", "Content-Length": str(size)}
    if request.method == "HEAD":
        return Response(headers=headers)
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    if match is None:
        raise HubError(400, "Only the header of this file is here: ask for a range of it")
    begin, end = int(match[1]), min(int(match[2]) + 1, size)
    if not begin < end <= begin + MAX_RANGE_BYTES:
        raise HubError(416, f"Ranges of at most {MAX_RANGE_BYTES} bytes of this file are served")
    header = stored.read_bytes()[begin:end]
    headers |= {"Content-Length": str(end - begin), "Content-Range": f"bytes {begin}-{end - 1}/{size}"}
    return Response(header.ljust(end - begin, b"\0"), 206, headers, "application/octet-stream")


@router.get("/api/{kind}/{namespace}/{name}/tree/{revision}")
def list_root(request: Request, hub: HubState, commit: ResolvedCommit, recursive: bool = False) -> JSONResponse:
    return list_folder(request, hub, commit, "", recursive)


@router.get("/api/{kind}/{namespace}/{name}/tree/{revision}/{path:path}")
def list_folder(
    request: Request, hub: HubState, commit: ResolvedCommit, path: FilePath, recursive: bool = False
) -> JSONResponse:
    tree = commit.tree
    prefix = f"{path}/" if path else ""
    found = [
        name
        for name in sorted(tree.keys() | folders(tree))
        if name.startswith(prefix) and (recursive or "/" not in name[len(prefix) :])
    ]
    if path and not found:
        raise HubError(404, f"{path} does not exist", "EntryNotFound", commit=commit.id)
    page, headers = one_page(request, found, hub.limits.tree_page)
    return JSONResponse([_describe(hub, tree, name) for name in page], headers=headers)


@router.post("/api/{kind}/{namespace}/{name}/paths-info/{revision}")
async def paths_info(request: Request, hub: HubState, commit: ResolvedCommit) -> list[dict[str, Any]]:
    """Describe those of the form's `paths` that exist."""
    form = parse_qs((await request.body()).decode())
    existing = commit.tree.keys() | folders(commit.tree)
    return [_describe(hub, commit.tree, path) for path in form.get("paths", []) if path in existing]


def _describe(hub: Hub, tree: Tree, path: str) -> dict[str, Any]:
    """Describe a file or folder as the Hub lists it."""
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
    if xet := _find_in_xet(hub, entry):
        row["xetHash"] = xet.hash
    return row
