"""What tests tell the stand-in, under `/_standin/`, from the machine it runs on only.

    POST   /_standin/tokens     {token, user, orgs?, role?: write|read}
    POST   /_standin/seed       {repo_id, folder, repo_type?, message?, revision?,
                                 delete_missing?, headers_only?} -> {commit}
    PUT    /_standin/repos/{id} {repo_type?, private?, gated?, granted?}
    POST   /_standin/faults     a fault, see `infra.dev.hub.faults.Fault`
    DELETE /_standin/faults
    GET    /_standin/traffic -> [{method, path, query, status, bytes_in, bytes_out}]
    DELETE /_standin/traffic

Requests to these are not disturbed and not logged.
"""

from dataclasses import asdict
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict

from infra.dev.hub.access import HubError, HubState
from infra.dev.hub.faults import Disturbance, Fault
from infra.dev.hub.hub import User
from infra.dev.hub.seeding import seed


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TokenBody(_Body):
    token: str
    user: str
    orgs: tuple[str, ...] = ()
    role: Literal["write", "read"] = "write"


class SeedBody(_Body):
    repo_id: str
    folder: Path
    repo_type: Literal["model", "dataset"] = "model"
    message: str = "Seed"
    revision: str = "main"
    delete_missing: bool = False
    headers_only: bool = False


class RepositoryBody(_Body):
    repo_type: Literal["model", "dataset"] = "model"
    private: bool | None = None
    gated: bool | Literal["auto", "manual"] | None = None
    granted: tuple[str, ...] | None = None


def only_from_here(request: Request) -> None:
    """Refuse whoever is not on this machine."""
    if request.client is None or not ip_address(request.client.host).is_loopback:
        raise HubError(403, "The stand-in takes orders from its own machine only")


def get_disturbance(request: Request) -> Disturbance:
    disturbance: Disturbance = request.app.state.disturbance
    return disturbance


Disturbed = Annotated[Disturbance, Depends(get_disturbance)]
router = APIRouter(prefix="/_standin", dependencies=[Depends(only_from_here)])


@router.post("/tokens")
def add_token(hub: HubState, body: TokenBody) -> None:
    hub.add_token(body.token, User(body.user, body.orgs, body.role))


@router.post("/seed")
def seed_folder(hub: HubState, body: SeedBody) -> dict[str, str]:
    try:
        commit = seed(
            hub,
            f"{body.repo_type}s",
            body.repo_id,
            body.folder,
            message=body.message,
            revision=body.revision,
            delete_missing=body.delete_missing,
            headers_only=body.headers_only,
        )
    except NotADirectoryError as error:
        raise HubError(400, str(error)) from error
    return {"commit": commit.id}


@router.put("/repos/{namespace}/{name}")
def change_repository(hub: HubState, namespace: str, name: str, body: RepositoryBody) -> None:
    repository = hub.find(f"{body.repo_type}s", f"{namespace}/{name}")
    if repository is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    changes: dict[str, Any] = body.model_dump(exclude_none=True, exclude={"repo_type"})
    if "gated" in changes:
        changes["gated"] = {True: "manual", False: None}.get(changes["gated"], changes["gated"])
    repository.change_settings(**changes)


@router.post("/faults")
async def add_fault(disturbance: Disturbed, fault: Fault) -> None:
    disturbance.faults.append(fault)


@router.delete("/faults")
async def clear_faults(disturbance: Disturbed) -> None:
    disturbance.clear()


@router.get("/traffic")
async def traffic(disturbance: Disturbed) -> list[dict[str, Any]]:
    return [asdict(exchange) for exchange in disturbance.traffic]


@router.delete("/traffic")
async def reset_traffic(disturbance: Disturbed) -> None:
    disturbance.traffic.clear()
