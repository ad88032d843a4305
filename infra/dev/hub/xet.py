"""Uploads through Xet: the token for the storage, and the storage itself, which takes xorbs and shards.

The address of the storage names the repository. Once a shard has come, the files that it describes are joined of their
chunks and become large files of the repository, so that they can be committed and downloaded like all others.
"""

import hashlib
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from infra.dev.hub.access import HubError, HubState, WritableRepository
from infra.dev.hub.hub import Hub
from infra.dev.hub.repository import Repository
from infra.dev.hub.tree import Entry
from infra.dev.hub.xet_format import MalformedUpload, XetFile, chunks_of, files_of

router = APIRouter()
TOKEN_LIFETIME_S = 3600
STORAGE = "/_xet/{kind}/{namespace}/{name}"


@router.get("/api/{kind}/{namespace}/{name}/xet-write-token/{revision}")
def write_token(request: Request, hub: HubState, repository: WritableRepository, kind: str) -> dict[str, Any]:
    """Give out a token for the storage of a repository."""
    token = secrets.token_urlsafe(16)
    expires = int(time.time()) + TOKEN_LIFETIME_S
    hub.xet_tokens[token] = (f"{repository.kind}/{repository.id}", expires)
    address = f"{request.base_url}_xet/{repository.kind}/{repository.id}"
    return {"accessToken": token, "exp": expires, "casUrl": address}


@router.get(STORAGE + "/v1/chunks/{prefix}/{chunk}")
@router.get(STORAGE + "/v2/chunks/{prefix}/{chunk}")
def find_chunk(request: Request, hub: HubState, chunk: str) -> None:
    """Say that no other xorb has a chunk. The client finds out by itself what it has sent in this upload."""
    _repository(request, hub)
    raise HubError(404, f"No xorb with the chunk {chunk}")


@router.post(STORAGE + "/v1/xorbs/{prefix}/{xorb}")
async def receive_xorb(request: Request, hub: HubState, xorb: str) -> dict[str, Any]:
    """Keep a xorb until a shard names it."""
    _repository(request, hub)
    data = await request.body()
    path = hub.xorbs / xorb
    there = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = hub.temporary()
    temporary.write_bytes(data)
    temporary.replace(path)
    return {"was_inserted": not there}


@router.post(STORAGE + "/v1/shards")
@router.post(STORAGE + "/shards")
async def receive_shard(request: Request, hub: HubState) -> dict[str, Any]:
    """Make the files of a shard large files of the repository. Answers 400 if they are not what they claim to be."""
    repository = _repository(request, hub)
    shard = await request.body()
    try:
        await run_in_threadpool(_join_all, hub, repository, shard)
    except (MalformedUpload, FileNotFoundError) as error:
        raise HubError(400, f"The shard cannot be used: {error}") from error
    return {"result": 1}


def _join_all(hub: Hub, repository: Repository, shard: bytes) -> None:
    for file in files_of(shard):
        _join(hub, repository, file)


def _join(hub: Hub, repository: Repository, file: XetFile) -> None:
    """Join a file of its segments, and check its sha256."""
    digest, size = hashlib.sha256(), 0
    temporary = hub.temporary()
    with temporary.open("wb") as stream:
        for segment in file.segments:
            chunks = list(chunks_of((hub.xorbs / segment.xorb).read_bytes()))[segment.begin : segment.end]
            for chunk in chunks:
                stream.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    if digest.hexdigest() != file.sha256:
        temporary.unlink()
        raise MalformedUpload(f"the file has the sha256 {digest.hexdigest()}, not {file.sha256}")
    repository.adopt_lfs(temporary, Entry.lfs(file.sha256, size))


def _repository(request: Request, hub: Hub) -> Repository:
    """Return the repository whose storage a request addresses. Raises HubError for a token that is not for it."""
    kind, namespace, name = (request.path_params[key] for key in ("kind", "namespace", "name"))
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    address, expires = hub.xet_tokens.get(token, ("", 0))
    repository = hub.find(kind, f"{namespace}/{name}")
    if repository is None or address != f"{kind}/{namespace}/{name}" or expires < time.time():
        raise HubError(401, "The token is not valid for this storage")
    return repository
