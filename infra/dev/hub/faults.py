"""Failures on demand, and a log of the traffic.

A fault names the requests that it applies to and what happens to them. The first fault that matches a request is
applied; its effects may be combined. See `Fault` for all of them.

This is plain ASGI middleware around the whole application: bodies stay streams, and a cut leaves a response
unfinished, so that the server closes the connection under the client.
"""

import asyncio
import json
import re
from collections import deque
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADMIN_PREFIX = "/_standin/"
_METHODS_WITH_BODY = {"POST", "PUT", "PATCH"}


class Fault(BaseModel):
    """Which requests fail, and how.

    path_regex: applies to requests with a match in their decoded path and query.
    method: applies to this method only; None for all.
    times: how many requests fail; None for all.
    skip: how many matching requests succeed first.
    status: answer with this status at once, and `retry_after` (seconds) as `Retry-After`.
    delay: seconds before anything happens.
    bytes_per_second: the speed at which the response body is sent.
    cut_after_bytes: close the connection after so many bytes of the response body. 0 loses the whole answer to a
        request that was carried out.
    cut_request_after_bytes: close the connection after so many bytes of the request body, if that is read.
    corrupt: flip one bit of the request body of a POST, PUT or PATCH, and of the response body otherwise.
    hold_request: hold the request back until the faults are cleared. If its connection ends before that, the request
        is never carried out.
    hold_after_bytes: send nothing after so many bytes of the response body, until the faults are cleared or the
        connection ends. 0 holds the whole answer to a request that was carried out.
    """

    model_config = ConfigDict(extra="forbid")

    path_regex: str = ""
    method: str | None = None
    times: int | None = 1
    skip: int = 0
    status: int | None = None
    retry_after: int | None = None
    delay: float = 0
    bytes_per_second: int | None = None
    cut_after_bytes: int | None = None
    cut_request_after_bytes: int | None = None
    corrupt: bool = False
    hold_request: bool = False
    hold_after_bytes: int | None = None

    def matches(self, method: str, address: str) -> bool:
        """Check whether the fault applies to this request, and count it."""
        if self.times == 0 or (self.method and self.method.upper() != method):
            return False
        if not re.search(self.path_regex, address):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class Exchange:
    """One request and its answer, with the sizes of both bodies. `status` is 0 while there is no answer."""

    method: str
    path: str
    query: str
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class ConnectionCut(Exception):
    """The connection of the request is to be closed."""


class Disturbance:
    """Middleware that logs every request and applies faults."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.faults: list[Fault] = []
        self.traffic: list[Exchange] = []
        self._cleared = asyncio.Event()

    def clear(self) -> None:
        """Remove all faults, and let the requests go on that they hold."""
        self.faults.clear()
        self._cleared.set()
        self._cleared = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(ADMIN_PREFIX):
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope["method"], scope["path"], scope["query_string"].decode())
        self.traffic.append(exchange)
        address = f"{exchange.path}?{exchange.query}" if exchange.query else exchange.path
        fault = next((fault for fault in self.faults if fault.matches(exchange.method, address)), None)
        channel = _Channel(exchange, fault or Fault(), receive, send, self._cleared)
        await asyncio.sleep(channel.fault.delay)
        if channel.fault.status:
            await channel.refuse(channel.fault.status)
            return
        try:
            if channel.fault.hold_request:
                await channel.hold()
            await self.app(scope, channel.receive, channel.send)
        except ConnectionCut:
            await channel.abandon()


class _Channel:
    """Both directions of one request, with a fault applied to them."""

    def __init__(self, exchange: Exchange, fault: Fault, receive: Receive, send: Send, cleared: asyncio.Event) -> None:
        self.fault = fault
        self._cleared = cleared
        self._received: deque[Message] = deque()
        self._exchange = exchange
        self._receive, self._send = receive, send
        self._corrupts_request = fault.corrupt and exchange.method in _METHODS_WITH_BODY
        self._corrupts_response = fault.corrupt and not self._corrupts_request
        self._is_cut = False

    async def hold(self) -> None:
        """Wait until the faults are cleared. Raises ConnectionCut if the client closes the connection before that."""
        gone, cleared = asyncio.ensure_future(self._wait_for_end()), asyncio.ensure_future(self._cleared.wait())
        await asyncio.wait({gone, cleared}, return_when=asyncio.FIRST_COMPLETED)
        left = gone.done()
        for waiting in (gone, cleared):
            waiting.cancel()
        if left:
            self._is_cut = True
            raise ConnectionCut

    async def _wait_for_end(self) -> None:
        """Wait for the end of the connection. What the client sends meanwhile is received later."""
        while True:
            message = await self._receive()
            self._received.append(message)
            if message["type"] == "http.disconnect":
                return

    async def receive(self) -> Message:
        message = self._received.popleft() if self._received else await self._receive()
        if message["type"] == "http.request":
            body = message.get("body", b"")
            self._exchange.bytes_in += len(body)
            limit = self.fault.cut_request_after_bytes
            if limit is not None and self._exchange.bytes_in >= limit:
                self._is_cut = True
                raise ConnectionCut
            if body and self._corrupts_request:
                self._corrupts_request = False
                message["body"] = _flip_bit(body)
        return message

    async def send(self, message: Message) -> None:
        if self._is_cut:
            raise ConnectionCut  # the application tries to answer the request whose body was cut
        if message["type"] == "http.response.start":
            self._exchange.status = message["status"]
            if self.fault.hold_after_bytes == 0:
                await self.hold()
            await self._send(message)
            return
        body = message.get("body", b"")
        if body and self._corrupts_response:
            self._corrupts_response = False
            body = _flip_bit(body)
        limit = self.fault.cut_after_bytes
        if limit is not None and self._exchange.bytes_out + len(body) > limit:
            await self._send_body(message, body[: limit - self._exchange.bytes_out], more=True)
            raise ConnectionCut
        limit = self.fault.hold_after_bytes
        if limit and self._exchange.bytes_out + len(body) > limit:
            first, body = body[: limit - self._exchange.bytes_out], body[limit - self._exchange.bytes_out :]
            await self._send_body(message, first, more=True)
            self.fault = self.fault.model_copy(update={"hold_after_bytes": None})
            await self.hold()
        await self._send_body(message, body, more=message.get("more_body", False))

    async def _send_body(self, message: MutableMapping[str, Any], body: bytes, *, more: bool) -> None:
        rate = self.fault.bytes_per_second
        step = max(1, rate // 10) if rate else len(body)
        while rate and len(body) > step:
            await self._send_piece(message, body[:step], more=True)
            await asyncio.sleep(step / rate)
            body = body[step:]
        await self._send_piece(message, body, more=more)

    async def _send_piece(self, message: MutableMapping[str, Any], piece: bytes, *, more: bool) -> None:
        self._exchange.bytes_out += len(piece)
        await self._send({**message, "body": piece, "more_body": more})

    async def refuse(self, status: int) -> None:
        """Answer with an error instead of carrying the request out."""
        headers = [(b"content-type", b"application/json")]
        if self.fault.retry_after is not None:
            headers.append((b"retry-after", str(self.fault.retry_after).encode()))
        body = json.dumps({"error": "a fault of the stand-in"}).encode()
        headers.append((b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def abandon(self) -> None:
        """Leave the response unfinished, which makes the server close the connection."""
        if not self._exchange.status:
            headers = [(b"content-length", b"1")]
            await self._send({"type": "http.response.start", "status": 500, "headers": headers})


def _flip_bit(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]
