"""Branches, tags and the history of a repository."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse

from infra.dev.hub.access import HubError, ReadableRepository, ResolvedCommit, Revision, WritableRepository
from infra.dev.hub.paging import one_page

router = APIRouter(prefix="/api/{kind}/{namespace}/{name}")
PAGE_ROWS = 50
JsonBody = Annotated[dict[str, Any], Body()]


@router.get("/refs")
def list_refs(repository: ReadableRepository, include_prs: bool = False) -> dict[str, Any]:
    def describe(kind: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit_id}
            for name, commit_id in repository.refs(kind).items()
        ]

    refs = {"branches": describe("heads"), "tags": describe("tags"), "converts": []}
    return {**refs, "pullRequests": describe("pr")} if include_prs else refs


@router.get("/commits/{revision}")
def list_commits(request: Request, repository: ReadableRepository, commit: ResolvedCommit) -> JSONResponse:
    page, headers = one_page(request, list(repository.history(commit)), PAGE_ROWS)
    rows = [
        {
            "id": commit.id,
            "title": commit.title,
            "message": commit.description,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in page
    ]
    return JSONResponse(rows, headers=headers)


@router.post("/tag/{revision}")
def create_tag(repository: WritableRepository, commit: ResolvedCommit, body: JsonBody) -> None:
    repository.create_ref(f"refs/tags/{body['tag']}", commit.id)


@router.delete("/tag/{revision}")
def delete_tag(repository: WritableRepository, revision: Revision) -> None:
    repository.delete_ref(f"refs/tags/{revision}")


@router.post("/branch/{revision}")
def create_branch(repository: WritableRepository, revision: Revision, body: JsonBody) -> None:
    start = repository.resolve(body.get("startingPoint") or "main")
    repository.create_ref(f"refs/heads/{revision}", start.id)


@router.delete("/branch/{revision}")
def delete_branch(repository: WritableRepository, revision: Revision) -> None:
    if revision == "main":
        raise HubError(403, "The default branch cannot be deleted.")
    repository.delete_ref(f"refs/heads/{revision}")
