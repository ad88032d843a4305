"""What a request may see and do, and the errors that the client understands.

The client chooses its exception by the header `X-Error-Code`, and recognizes a wrong token by `X-Error-Message`. As on
the Hub, a private repository and one that does not exist look the same: 404 to users, 401 to anonymous callers.
"""

from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Request
from fastapi.responses import JSONResponse

from infra.dev.hub.hub import Hub, InvalidRepoId, RepoExists, User
from infra.dev.hub.repository import Commit, InvalidRef, RefExists, Repository, RevisionNotFound, StaleParent
from infra.dev.hub.tree import InvalidPath, MissingPath
from infra.dev.hub.xet import BrokenUpload


class HubError(Exception):
    """An answer other than success, with the headers that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, *, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message.encode("ascii", "replace").decode()}
        if code:
            self.headers["X-Error-Code"] = code
        if commit:
            self.headers["X-Repo-Commit"] = commit


STATUS_OF_ERROR: dict[type[Exception], tuple[int, str | None]] = {
    BrokenUpload: (400, None),
    InvalidPath: (400, None),
    InvalidRef: (400, None),
    InvalidRepoId: (400, None),
    MissingPath: (404, "EntryNotFound"),
    RefExists: (409, None),
    RepoExists: (409, None),
    RevisionNotFound: (404, "RevisionNotFound"),
    StaleParent: (412, None),
}


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Turn an error of this package into the answer that the Hub would give."""
    if not isinstance(error, HubError):
        status, code = STATUS_OF_ERROR[type(error)]
        message = "Invalid rev id: " if isinstance(error, RevisionNotFound) else ""
        error = HubError(status, f"{message}{error}", code)
    return JSONResponse({"error": error.message}, error.status, error.headers)


def get_hub(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


HubState = Annotated[Hub, Depends(get_hub)]


def get_caller(request: Request, hub: HubState) -> User | None:
    """Return the user whose token the request carries, or None without one. Raises HubError for an unknown token."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    user = hub.users.get(header.removeprefix("Bearer "))
    if user is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return user


Caller = Annotated[User | None, Depends(get_caller)]


def get_writer(request: Request, caller: Caller) -> User:
    """Return a caller whose token may write. Raises HubError."""
    if caller is None:
        # The client reads a 401 from these addresses as a missing repository; over plain http only with this code.
        about_repository = request.url.path.startswith(("/api/models/", "/api/datasets/"))
        code = "RepoNotFound" if about_repository else None
        raise HubError(401, "Invalid username or password.", code)
    if caller.role != "write":
        raise HubError(403, "Your token needs the write role to do this.")
    return caller


Writer = Annotated[User, Depends(get_writer)]


def get_repository(request: Request, hub: HubState, caller: Caller) -> Repository:
    """Return the repository that the address names. Raises HubError if the caller may not know of it."""
    parameters = {key: unquote(value) for key, value in request.path_params.items()}
    repo_id = f"{parameters['namespace']}/{parameters['name']}"
    repository = hub.find(parameters.get("kind", "models"), repo_id)
    if repository and (not repository.state.private or (caller and caller.owns(repo_id))):
        return repository
    if caller is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
    raise HubError(404, "Repository not found", "RepoNotFound")


ReadableRepository = Annotated[Repository, Depends(get_repository)]


def get_open_repository(repository: ReadableRepository, caller: Caller) -> Repository:
    """Return a repository whose files the caller may read. Raises HubError for a gated one of someone else."""
    if repository.state.gated is None or (caller and caller.owns(repository.id)):
        return repository
    message = f"Access to {repository.id} is restricted and you are not in the authorized list."
    raise HubError(403 if caller else 401, message, "GatedRepo")


OpenRepository = Annotated[Repository, Depends(get_open_repository)]


def get_writable_repository(repository: ReadableRepository, writer: Writer) -> Repository:
    """Return a repository that the caller may write to. Raises HubError."""
    if not writer.owns(repository.id):
        raise HubError(403, f"You don't have the rights to write to {repository.id}.")
    return repository


WritableRepository = Annotated[Repository, Depends(get_writable_repository)]


def get_revision(request: Request) -> str:
    return unquote(request.path_params["revision"])


Revision = Annotated[str, Depends(get_revision)]


def get_commit(repository: ReadableRepository, revision: Revision) -> Commit:
    return repository.resolve(revision)


ResolvedCommit = Annotated[Commit, Depends(get_commit)]


def get_file_path(request: Request) -> str:
    return unquote(request.path_params["path"])


FilePath = Annotated[str, Depends(get_file_path)]


def repo_url(request: Request, repository: Repository) -> str:
    """Return the address of a repository's page."""
    prefix = "" if repository.kind == "models" else f"{repository.kind}/"
    return f"{request.base_url}{prefix}{repository.id}"
