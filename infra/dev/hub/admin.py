"""The requests under `/_standin/`, with which tests control the stand-in.

    POST   /_standin/tokens     {token, user, orgs?, role?: write|read}
    POST   /_standin/seed       {repo_id, folder, repo_type?, message?, revision?,
                                 delete_missing?, headers_only?} -> {commit}
    PUT    /_standin/repos/{id} {repo_type?, private?, gated?}
    PUT    /_standin/xet        {enabled?, cas_url?, token_lifetime_s?}; what is left out gets its default
    POST   /_standin/faults     a fault, see `infra.dev.hub.faults.Fault`
    DELETE /_standin/faults
    GET    /_standin/traffic -> [{method, path, query, status, bytes_in, bytes_out}]
    DELETE /_standin/traffic

Faults do not apply to these requests, and they are not logged.
"""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict

from infra.dev.hub.access import HubError, HubState
from infra.dev.hub.faults import Disturbance, Fault
from infra.dev.hub.hub import User, XetSettings
from infra.dev.hub.seeding import Seed, seed


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TokenBody(_Body):
    token: str
    user: str
    orgs: tuple[str, ...] = ()
    role: Literal["write", "read"] = "write"


class RepositoryBody(_Body):
    repo_type: Literal["model", "dataset"] = "model"
    private: bool | None = None
    gated: bool | None = None


def get_disturbance(request: Request) -> Disturbance:
    disturbance: Disturbance = request.app.state.disturbance
    return disturbance


Disturbed = Annotated[Disturbance, Depends(get_disturbance)]
router = APIRouter(prefix="/_standin")


@router.post("/tokens")
def add_token(hub: HubState, body: TokenBody) -> None:
    hub.users[body.token] = User(body.user, body.orgs, body.role)


@router.post("/seed")
def seed_folder(hub: HubState, body: Seed) -> dict[str, str]:
    try:
        return {"commit": seed(hub, body).id}
    except NotADirectoryError as error:
        raise HubError(400, str(error)) from error


@router.put("/repos/{namespace}/{name}")
def change_repository(hub: HubState, namespace: str, name: str, body: RepositoryBody) -> None:
    repository = hub.find(f"{body.repo_type}s", f"{namespace}/{name}")
    if repository is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    with repository.changing() as state:
        if body.private is not None:
            state.private = body.private
        if body.gated is not None:
            state.gated = "manual" if body.gated else None


@router.put("/xet")
def change_xet(hub: HubState, settings: XetSettings) -> None:
    hub.xet_settings = settings


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
