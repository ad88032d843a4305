"""The requests of Xet: tokens from the Hub, and the storage ("CAS") under `/_cas/`.

Uploads send xorbs, then a shard that says which of their chunks make which file; the commit then names the file by its
sha256, as for LFS. Downloads ask how a file is made, and fetch ranges of xorbs from signed addresses.

Only version 1 of each request exists, and no chunk is known across repositories (404): the client then uses what it
knows, as the real storage allows.
"""

import hmac
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response

from infra.dev.hub.access import HubError, HubState, OpenRepository, Revision
from infra.dev.hub.commits import Target
from infra.dev.hub.hub import Hub
from infra.dev.hub.repository import Repository
from infra.dev.hub.xet import HASH, XetFile

router = APIRouter()
Scope = Literal["read", "write"]


@router.get("/api/{kind}/{namespace}/{name}/xet-write-token/{revision}")
def write_token(request: Request, hub: HubState, repository: Target, revision: Revision) -> JSONResponse:
    return _give_token(request, hub, repository, "write")


@router.get("/api/{kind}/{namespace}/{name}/xet-read-token/{revision}")
def read_token(request: Request, hub: HubState, repository: OpenRepository, revision: Revision) -> JSONResponse:
    return _give_token(request, hub, repository, "read")


def _give_token(request: Request, hub: Hub, repository: Repository, scope: Scope) -> JSONResponse:
    if not hub.xet_settings.enabled:
        raise HubError(404, "Sorry, we can't find the page you are looking for.")
    expiry = int(time.time()) + hub.xet_settings.token_lifetime_s
    token = f"{scope}.{expiry}.{hub.sign('xet', scope, expiry)}"
    address = hub.xet_settings.cas_url or f"{request.base_url}_cas"
    body = {"accessToken": token, "exp": expiry, "casUrl": address}
    headers = {"X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry), "X-Xet-Cas-Url": address}
    return JSONResponse(body, headers=headers)


def check_token(request: Request, hub: HubState) -> Scope:
    """Return what the token of a request allows. Raises HubError."""
    parts = request.headers.get("authorization", "").removeprefix("Bearer ").split(".")
    valid = len(parts) == 3 and hmac.compare_digest(hub.sign("xet", parts[0], parts[1]), parts[2])
    if not valid or int(parts[1]) <= time.time():
        raise HubError(401, "The token of the storage is not valid, or no longer")
    return "write" if parts[0] == "write" else "read"


def check_write_token(scope: Annotated[Scope, Depends(check_token)]) -> None:
    if scope != "write":
        raise HubError(403, "The token of the storage may not write")


Reading, Writing = Depends(check_token), Depends(check_write_token)


@router.post("/_cas/v1/xorbs/default/{xorb}", dependencies=[Writing])
async def put_xorb(request: Request, hub: HubState, xorb: str) -> dict[str, bool]:
    if not HASH.fullmatch(xorb):
        raise HubError(400, f"'{xorb}' is not a hash")
    data = await request.body()
    return {"was_inserted": await run_in_threadpool(hub.xet.put_xorb, xorb, data)}


@router.post("/_cas/v1/shards", dependencies=[Writing])
async def put_shard(request: Request, hub: HubState) -> dict[str, int]:
    shard = await request.body()
    return {"result": int(await run_in_threadpool(hub.xet.put_shard, shard))}


@router.get("/_cas/v1/reconstructions/{file_hash}", dependencies=[Reading])
def describe_file(request: Request, hub: HubState, file_hash: str) -> dict[str, Any]:
    """Say which chunks make a file, or the range of it that the request names, and where they are."""
    file = hub.xet.find(file_hash)
    if file is None:
        raise HubError(404, f"There is no file {file_hash}")
    begin, end = _read_range(request, file)
    terms, places, at, skipped = [], dict[str, list[dict[str, Any]]](), 0, None
    for segment in file.segments:
        if at >= end or at + segment.size <= begin:
            at += segment.size
            continue
        chosen = []
        for index, chunk in enumerate(hub.xet.chunks_of(segment), segment.start):
            if at < end and at + chunk.size > begin:
                skipped = max(begin - at, 0) if skipped is None else skipped
                chosen.append((index, chunk))
            at += chunk.size
        (first, start), (last, stop) = chosen[0], chosen[-1]
        span = {"start": first, "end": last + 1}
        terms.append({"hash": segment.xorb, "unpacked_length": sum(c.size for _, c in chosen), "range": span})
        url = f"{request.base_url}_cas/xorbs/{segment.xorb}?signature={hub.sign('xorb', segment.xorb)}"
        place = {"start": start.offset, "end": stop.offset + stop.stored - 1}
        places.setdefault(segment.xorb, []).append({"range": span, "url": url, "url_range": place})
    return {"offset_into_first_range": skipped or 0, "terms": terms, "fetch_info": places}


def _read_range(request: Request, file: XetFile) -> tuple[int, int]:
    """Return the first byte and the one behind the last that a request asks for. Raises HubError."""
    header = request.headers.get("range")
    if header is None:
        return 0, file.size
    first, _, last = header.removeprefix("bytes=").partition("-")
    begin, end = int(first), min(int(last) + 1 if last else file.size, file.size)
    if begin >= end:
        raise HubError(416, f"The file has {file.size} bytes")
    return begin, end


@router.get("/_cas/xorbs/{xorb}")
def get_xorb(hub: HubState, xorb: str, signature: str) -> Response:
    """Send the range of a xorb that the request names."""
    if not hmac.compare_digest(hub.sign("xorb", xorb), signature):
        raise HubError(403, "The signature of this address is not valid")
    return FileResponse(hub.xet.xorb_path(xorb), media_type="application/octet-stream")
