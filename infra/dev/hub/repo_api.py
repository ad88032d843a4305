"""The account of a token; repositories: create, delete, settings, info; the check of a model card."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse

from infra.dev.hub.access import (
    Caller,
    HubError,
    HubState,
    OpenRepository,
    ReadableRepository,
    ResolvedCommit,
    WritableRepository,
    Writer,
    repo_url,
)
from infra.dev.hub.card import base_model_tags, check_card, metadata
from infra.dev.hub.hub import User
from infra.dev.hub.repository import Commit, Repository
from infra.dev.hub.tree import Entry

router = APIRouter()
JsonBody = Annotated[dict[str, Any], Body()]


@router.get("/api/whoami-v2")
def whoami(caller: Caller) -> dict[str, Any]:
    if caller is None:
        raise HubError(401, "Invalid username or password.")
    return {
        "type": "user",
        "id": caller.name,
        "name": caller.name,
        "fullname": caller.name,
        "orgs": [{"type": "org", "name": org} for org in caller.orgs],
        "auth": {"type": "access_token", "accessToken": {"role": caller.role}},
    }


@router.post("/api/repos/create")
def create_repo(request: Request, hub: HubState, writer: Writer, body: JsonBody) -> JSONResponse:
    kind, repo_id = _named_repository(body, writer)
    if not writer.owns(repo_id):
        message = f'You don\'t have the rights to create a {kind[:-1]} under "{repo_id}".'
        raise HubError(403, message)
    if existing := hub.find(kind, repo_id):
        content = {
            "error": f"You already created this {kind[:-1]} repo: {repo_id}",
            "url": repo_url(request, existing),
        }
        return JSONResponse(content, 409)
    private = body.get("private", False) or body.get("visibility") == "private"
    repository = hub.create(kind, repo_id, private=private)
    return JSONResponse({"url": repo_url(request, repository), "name": repo_id, "id": repo_id})


@router.delete("/api/repos/delete")
def delete_repo(hub: HubState, writer: Writer, body: JsonBody) -> None:
    repository = hub.find(*_named_repository(body, writer))
    if repository is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    if not writer.owns(repository.id):
        raise HubError(403, f"You don't have the rights to delete {repository.id}.")
    hub.delete(repository)


def _named_repository(body: dict[str, Any], writer: User) -> tuple[str, str]:
    """Return kind and id of the repository that the body of a request names."""
    namespace = body.get("organization") or writer.name
    return f"{body.get('type') or 'model'}s", f"{namespace}/{body['name']}"


@router.put("/api/{kind}/{namespace}/{name}/settings")
def change_settings(repository: WritableRepository, body: JsonBody) -> None:
    with repository.changing() as state:
        if "private" in body or "visibility" in body:
            state.private = body.get("private") or body.get("visibility") == "private"
        if "gated" in body:
            state.gated = body["gated"] or None


@router.get("/api/{kind}/{namespace}/{name}")
def info(repository: ReadableRepository, blobs: bool = False) -> dict[str, Any]:
    return _info(repository, repository.resolve("main"), blobs)


@router.get("/api/{kind}/{namespace}/{name}/revision/{revision}")
def info_at(repository: ReadableRepository, commit: ResolvedCommit, blobs: bool = False) -> dict[str, Any]:
    return _info(repository, commit, blobs)


def _info(repository: Repository, commit: Commit, blobs: bool) -> dict[str, Any]:
    tree, state = commit.tree, repository.state
    *_, first = repository.history(commit)
    card = tree.get("README.md")
    card_text = repository.object_path(card).read_text(errors="replace") if card else ""
    card_data = metadata(card_text)
    return {
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.id.partition("/")[0],
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": first.date,
        "private": state.private,
        "gated": state.gated or False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [*(card_data or {}).get("tags", []), *base_model_tags(card_data or {})],
        "cardData": card_data,
        "siblings": [_sibling(path, entry, blobs) for path, entry in sorted(tree.items())],
    }


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    sibling: dict[str, Any] = {"rfilename": path, "blobId": entry.oid, "size": entry.size}
    if entry.sha256:
        sibling["lfs"] = {
            "sha256": entry.sha256,
            "size": entry.size,
            "pointerSize": entry.pointer_size,
        }
    return sibling


@router.get("/api/{kind}/{namespace}/{name}/auth-check")
def check_read_access(repository: OpenRepository) -> None:
    """Answer whether the caller may read the files."""


@router.get("/api/{kind}/{namespace}/{name}/auth-check/write")
def check_write_access(repository: WritableRepository) -> None:
    """Answer whether the caller may write."""


@router.get("/api/{kind}/{name}")
@router.api_route("/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
def no_namespace(name: str) -> None:
    raise HubError(404, f"Repository not found: {name} has no namespace", "RepoNotFound")


@router.post("/api/validate-yaml")
def validate_yaml(body: JsonBody) -> JSONResponse:
    errors, warnings = check_card(body["content"])
    content = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return JSONResponse(content, 400 if errors else 200)
