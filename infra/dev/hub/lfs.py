"""Uploads of large files: the LFS batch call, then one PUT, or one for each part.

The addresses that the batch call hands out carry a signature instead of a token, as the client
uses them without one. A body becomes an object only if its size and sha256 are what its name
says.
"""

import hashlib
import hmac
import math
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Body, Request, Response
from fastapi.concurrency import run_in_threadpool

from infra.dev.hub.access import HubError, HubState, OpenRepository, Writer
from infra.dev.hub.hub import Hub
from infra.dev.hub.repository import SHA256, Repository
from infra.dev.hub.tree import Entry

router = APIRouter()
_COPY_BYTES = 2**20
JsonBody = Annotated[dict[str, Any], Body()]


@router.post("/{namespace}/{name}.git/info/lfs/objects/batch")
@router.post("/{kind}/{namespace}/{name}.git/info/lfs/objects/batch")
def batch(
    request: Request, hub: HubState, repository: OpenRepository, writer: Writer, body: JsonBody
) -> dict[str, Any]:
    """Say, for each object, where to send it; nothing for those that are already here."""
    multipart = "multipart" in body.get("transfers", ["basic"])
    objects = [
        _instructions(request, hub, repository, wanted["oid"], wanted["size"], multipart) for wanted in body["objects"]
    ]
    return {"transfer": "multipart" if multipart else "basic", "objects": objects}


def _instructions(
    request: Request, hub: Hub, repository: Repository, oid: str, size: int, multipart: bool
) -> dict[str, Any]:
    instructions: dict[str, Any] = {"oid": oid, "size": size}
    held = repository.lfs_entry(oid)
    if not SHA256.fullmatch(oid) or size < 0 or (held and held.size != size):
        return {**instructions, "error": {"code": 422, "message": "Invalid oid or size"}}
    if held:
        return instructions
    base = f"{request.base_url}_lfs/{repository.kind}/{repository.id}/{oid}"

    def signed(part: int) -> str:
        signature = hub.sign(repository.kind, repository.id, oid, size, part)
        return f"{base}?{urlencode({'size': size, 'part': part, 'signature': signature})}"

    upload: dict[str, Any] = {"href": signed(0)}
    if multipart and size > hub.limits.multipart_over:
        parts = range(1, math.ceil(size / hub.limits.part_size) + 1)
        upload["header"] = {
            "chunk_size": str(hub.limits.part_size),
            **{str(part): signed(part) for part in parts},
        }
    verify = f"{base}/verify"
    return {**instructions, "actions": {"upload": upload, "verify": {"href": verify}}}


@router.put("/_lfs/{kind}/{namespace}/{name}/{oid}")
async def upload(
    request: Request,
    hub: HubState,
    kind: str,
    namespace: str,
    name: str,
    oid: str,
    size: int,
    part: int,
    signature: str,
) -> Response:
    """Take a whole object (part 0), or one part of it."""
    repository = _addressed(hub, kind, f"{namespace}/{name}", oid, size, part, signature)
    temporary = hub.durable.temporary()
    try:
        received, digest = await _receive(request.stream(), temporary)
        if part == 0:
            await run_in_threadpool(_adopt, repository, temporary, oid, size, received, digest)
        else:
            path = _parts_folder(repository, oid) / f"{part}.{digest}"
            await run_in_threadpool(hub.durable.publish, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Response(headers={"ETag": f'"{digest}"'})


@router.post("/_lfs/{kind}/{namespace}/{name}/{oid}")
def complete(
    hub: HubState,
    kind: str,
    namespace: str,
    name: str,
    oid: str,
    size: int,
    part: int,
    signature: str,
    body: JsonBody,
) -> None:
    """Join the parts of an object."""
    repository = _addressed(hub, kind, f"{namespace}/{name}", oid, size, part, signature)
    if repository.lfs_entry(oid):
        return  # a completion whose answer was lost
    folder = _parts_folder(repository, oid)
    paths = [folder / f"{int(each['partNumber'])}.{_etag(each['etag'])}" for each in body["parts"]]
    if missing := [path.name for path in paths if not path.exists()]:
        raise HubError(400, f"Parts were not uploaded: {', '.join(missing)}")
    temporary = hub.durable.temporary()
    try:
        joined, digest = _join(paths, temporary)
        _adopt(repository, temporary, oid, size, joined, digest)
    finally:
        temporary.unlink(missing_ok=True)
        shutil.rmtree(folder)


@router.post("/_lfs/{kind}/{namespace}/{name}/{oid}/verify")
def verify(repository: OpenRepository, writer: Writer, oid: str, body: JsonBody) -> None:
    entry = repository.lfs_entry(oid)
    if entry is None or entry.size != body["size"]:
        raise HubError(404, f"LFS object {oid} is not here")


def _addressed(hub: Hub, kind: str, repo_id: str, oid: str, size: int, part: int, signature: str) -> Repository:
    """The repository that a signed upload address is for."""
    repository = hub.find(kind, repo_id)
    expected = hub.sign(kind, repo_id, oid, size, part)
    if repository is None or not hmac.compare_digest(signature, expected):
        raise HubError(403, "The signature of this upload address is not valid")
    return repository


async def _receive(body: AsyncIterator[bytes], path: Path) -> tuple[int, str]:
    """Write a body to a file; its size and sha256."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        async for chunk in body:
            size += len(chunk)
            digest.update(chunk)
            file.write(chunk)
    return size, digest.hexdigest()


def _join(parts: Iterable[Path], path: Path) -> tuple[int, str]:
    """Write all parts to one file; its size and sha256."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as joined:
        for part in parts:
            with part.open("rb") as file:
                while chunk := file.read(_COPY_BYTES):
                    size += len(chunk)
                    digest.update(chunk)
                    joined.write(chunk)
    return size, digest.hexdigest()


def _adopt(repository: Repository, path: Path, oid: str, size: int, received: int, digest: str) -> None:
    """Make a received file an object, if it is the one that was announced."""
    if (received, digest) != (size, oid):
        message = f"Received {received} bytes with sha256 {digest}, not {size} bytes with {oid}"
        raise HubError(400, message)
    repository.adopt_lfs(path, Entry.lfs(oid, size))


def _parts_folder(repository: Repository, oid: str) -> Path:
    return repository.folder / "uploads" / oid


def _etag(text: str) -> str:
    etag = text.strip('"')
    if not SHA256.fullmatch(etag):
        raise HubError(400, f"'{text}' is not the ETag of a part")
    return etag
