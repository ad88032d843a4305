"""The stand-in as one ASGI application."""

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.dev.hub import admin, collections_api, commits, content, discussions, lfs, refs_api, repo_api, xet_api
from infra.dev.hub.access import STATUS_OF_ERROR, HubError, answer_error
from infra.dev.hub.faults import Disturbance
from infra.dev.hub.hub import Hub


class RawPath:
    """Middleware that routes by the path as it was sent, so that `refs%2Fpr%2F1` is one segment.

    Handlers unquote the segments that they use.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        await self.app(scope, receive, send)


def create_app(hub: Hub) -> ASGIApp:
    """Return the application that serves a Hub."""
    app = FastAPI(title="Hub stand-in", redirect_slashes=False, openapi_url=None)
    for module in (admin, collections_api, repo_api, refs_api, commits, discussions, lfs, xet_api, content):
        app.include_router(module.router)
    errors: list[type[Exception]] = [HubError, *STATUS_OF_ERROR]
    for error in errors:
        app.add_exception_handler(error, answer_error)
    disturbance = Disturbance(RawPath(app))
    app.state.hub = hub
    app.state.disturbance = disturbance
    return disturbance
