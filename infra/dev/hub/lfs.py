"""Uploads of large files: the LFS batch call, then one PUT for the file or one for each part.

The upload addresses in the answer to the batch call carry a signature, as the client uses them without a token. A
body becomes an object only if it has the announced size and sha256.
"""

import hashlib
import hmac
import math
import shutil
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Body, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

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
    """Say where to send each object; nothing for those that the repository holds."""
    multipart = "multipart" in body.get("transfers", ["basic"])
    base = f"{request.base_url}_lfs/{repository.kind}/{repository.id}"
    objects = [
        _instruct(hub, repository, f"{base}/{wanted['oid']}", wanted["oid"], wanted["size"], multipart=multipart)
        for wanted in body["objects"]
    ]
    return {"transfer": "multipart" if multipart else "basic", "objects": objects}


def _instruct(
    hub: Hub, repository: Repository, address: str, oid: str, size: int, *, multipart: bool
) -> dict[str, Any]:
    instructions: dict[str, Any] = {"oid": oid, "size": size}
    held = repository.lfs_entry(oid)
    if not SHA256.fullmatch(oid) or size < 0 or (held and held.size != size):
        return {**instructions, "error": {"code": 422, "message": "Invalid oid or size"}}
    if held:
        return instructions

    def sign(part: int) -> str:
        signature = hub.sign(repository.kind, repository.id, oid, size, part)
        return f"{address}?{urlencode({'size': size, 'part': part, 'signature': signature})}"

    upload: dict[str, Any] = {"href": sign(0)}
    if multipart and size > hub.limits.multipart_over:
        parts = range(1, math.ceil(size / hub.limits.part_size) + 1)
        upload["header"] = {"chunk_size": str(hub.limits.part_size), **{str(part): sign(part) for part in parts}}
    return {**instructions, "actions": {"upload": upload, "verify": {"href": f"{address}/verify"}}}


class SignedQuery(BaseModel):
    """The query of an upload address. Part 0 is the whole object."""

    size: int
    part: int
    signature: str


@dataclass(frozen=True)
class Upload:
    """The object, or part of an object, that a signed address is for."""

    repository: Repository
    oid: str
    size: int
    part: int

    @property
    def parts_folder(self) -> Path:
        return self.repository.folder / "uploads" / self.oid

    def adopt(self, path: Path, size: int, sha256: str) -> None:
        """Make a received file an object, if it is the one that was announced."""
        if (size, sha256) != (self.size, self.oid):
            message = f"Received {size} bytes with sha256 {sha256}, not {self.size} bytes with {self.oid}"
            raise HubError(400, message)
        self.repository.adopt_lfs(path, Entry.lfs(self.oid, size))


def get_upload(request: Request, hub: HubState, query: Annotated[SignedQuery, Query()]) -> Upload:
    """Return the upload that a signed address is for. Raises HubError if the signature is not valid."""
    kind, namespace, name, oid = (request.path_params[key] for key in ("kind", "namespace", "name", "oid"))
    repository = hub.find(kind, f"{namespace}/{name}")
    expected = hub.sign(kind, f"{namespace}/{name}", oid, query.size, query.part)
    if repository is None or not hmac.compare_digest(query.signature, expected):
        raise HubError(403, "The signature of this upload address is not valid")
    return Upload(repository, oid, query.size, query.part)


SignedUpload = Annotated[Upload, Depends(get_upload)]


@router.put("/_lfs/{kind}/{namespace}/{name}/{oid}")
async def receive(request: Request, hub: HubState, upload: SignedUpload) -> Response:
    """Store a whole object, or one part of it."""
    temporary = hub.temporary()
    try:
        size, sha256 = await _write_body(request.stream(), temporary)
        if upload.part == 0:
            await run_in_threadpool(upload.adopt, temporary, size, sha256)
        else:
            upload.parts_folder.mkdir(parents=True, exist_ok=True)
            temporary.replace(upload.parts_folder / f"{upload.part}.{sha256}")
    finally:
        temporary.unlink(missing_ok=True)
    return Response(headers={"ETag": f'"{sha256}"'})


@router.post("/_lfs/{kind}/{namespace}/{name}/{oid}")
def complete(hub: HubState, upload: SignedUpload, body: JsonBody) -> None:
    """Join the parts of an object."""
    if upload.repository.lfs_entry(upload.oid):
        return  # the client asks again because the answer to its first request was lost
    paths = [upload.parts_folder / f"{int(part['partNumber'])}.{_read_etag(part['etag'])}" for part in body["parts"]]
    if missing := [path.name for path in paths if not path.exists()]:
        raise HubError(400, f"Parts were not uploaded: {', '.join(missing)}")
    temporary = hub.temporary()
    try:
        upload.adopt(temporary, *_join(paths, temporary))
    finally:
        temporary.unlink(missing_ok=True)
        shutil.rmtree(upload.parts_folder)


@router.post("/_lfs/{kind}/{namespace}/{name}/{oid}/verify")
def verify(repository: OpenRepository, writer: Writer, oid: str, body: JsonBody) -> None:
    entry = repository.lfs_entry(oid)
    if entry is None or entry.size != body["size"]:
        raise HubError(404, f"LFS object {oid} is not here")


async def _write_body(body: AsyncIterator[bytes], path: Path) -> tuple[int, str]:
    """Write a body to a file. Returns its size in bytes and its sha256."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        async for chunk in body:
            size += len(chunk)
            digest.update(chunk)
            file.write(chunk)
    return size, digest.hexdigest()


def _join(parts: Iterable[Path], path: Path) -> tuple[int, str]:
    """Write all parts to one file. Returns its size in bytes and its sha256."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as joined:
        for part in parts:
            with part.open("rb") as file:
                while chunk := file.read(_COPY_BYTES):
                    size += len(chunk)
                    digest.update(chunk)
                    joined.write(chunk)
    return size, digest.hexdigest()


def _read_etag(text: str) -> str:
    etag = text.strip('"')
    if not SHA256.fullmatch(etag):
        raise HubError(400, f"'{text}' is not the ETag of a part")
    return etag
