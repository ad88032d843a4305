"""Connections that end: uvicorn waits for a request's head for ever, and serves so many at a time and no more."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_AGE_S = 15.0  # of a connection; a request that is under way by then is answered first


class Connection(H11Protocol):
    """Closed when it is old, so that nobody without the secret shuts others out by asking nothing, or slowly."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(MAX_AGE_S, self._end)

    def _end(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # it ends by itself: see app.MAX_SECONDS
            self.loop.call_later(1.0, self._end)
        else:
            self.transport.close()
