"""The HTTP side of the relay: a payload with the right secret is answered with 202 before its repo is checked."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import Annotated, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from requant.flows.webhook.looker import Looker
from requant.tasks.documents import first_problem
from requant.tasks.recipe.quantize_section import REPO_ID

MAX_BODY_BYTES = 64 << 10  # A payload of the Hub has 2 KB.
BODY_TIMEOUT_S = 10.0
SECRET_HEADER = b"x-webhook-secret"


class PayloadPart(BaseModel):
    """A part of the Hub's payload (version 3). Other keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class WebhookEvent(PayloadPart):
    action: Annotated[str, Field(max_length=64)]
    scope: Annotated[str, Field(max_length=64)]


class Repo(PayloadPart):
    type: Annotated[str, Field(max_length=64)]
    name: Annotated[str, Field(pattern=REPO_ID)]


class Payload(PayloadPart):
    event: WebhookEvent
    repo: Repo

    @property
    def may_move_a_branch(self) -> bool:
        """Whether the event may have given a model repo a new commit."""
        return (
            self.repo.type == "model"
            and self.event.action in {"create", "update", "move"}
            and self.event.scope in {"repo", "repo.content"}
        )


class RelayRefusal(Exception):
    """An answer other than 202: its status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def create_app(secret: str, looker: Looker) -> FastAPI:
    """Create the app, with the routes POST /hub and /health."""
    app = FastAPI(title="Requant webhook relay", docs_url=None, redoc_url=None, openapi_url=None)
    expected = _digest(secret.encode())

    @app.exception_handler(RelayRefusal)
    async def refused(request: Request, error: RelayRefusal) -> JSONResponse:
        return JSONResponse({"error": error.sentence}, error.status)

    @app.get("/health")
    async def health() -> dict[str, Literal["ok"]]:
        return {"status": "ok"}

    @app.post("/hub", status_code=202)
    async def hub(request: Request, response: Response) -> dict[str, str]:
        sent = b"".join(value for name, value in request.headers.raw if name == SECRET_HEADER)
        if not hmac.compare_digest(_digest(sent), expected):  # The body of such a request is not read.
            raise RelayRefusal(401, "X-Webhook-Secret is missing or not the one that this relay was given")
        payload = _parse(await _body(request))
        # A connection is closed at its maximum age: a payload that is sent on it just then would be lost.
        response.headers["Connection"] = "close"
        if not payload.may_move_a_branch:
            return {"status": "ignored"}
        if not looker.look_at(payload.repo.name):
            raise RelayRefusal(
                503, "too many repos wait to be looked at: send it again, or leave it to the scheduled watch"
            )
        return {"status": "accepted"}

    return app


def _digest(secret: bytes) -> bytes:
    """Hash a secret, so that the time of a comparison does not reveal its length."""
    return hashlib.sha256(secret).digest()


async def _body(request: Request) -> bytes:
    """Read the body of a request. Raises RelayRefusal if it is too large or too slow."""
    too_large = RelayRefusal(413, f"the body has more than {MAX_BODY_BYTES} bytes: a payload of the Hub is far smaller")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise RelayRefusal(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    return bytes(body)


def _parse(body: bytes) -> Payload:
    """Parse a payload. Raises RelayRefusal if it is none."""
    try:
        return Payload.model_validate_json(body)
    except ValidationError as error:
        where, problem = first_problem(error)
        raise RelayRefusal(
            400, f"not a payload of the Hub's webhooks, version 3: {where or 'the body'}: {problem}"
        ) from None
