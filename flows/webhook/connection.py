"""Connections with a maximum age: uvicorn waits forever for a request, and limits how many it serves at a time."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTION_AGE_S = 15.0  # A request that is being processed by then is answered first.


class Connection(H11Protocol):
    """A connection that is closed at a maximum age, so that slow clients without the secret cannot block others."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(MAX_CONNECTION_AGE_S, self._end)

    def _end(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # app.BODY_TIMEOUT_S limits the request.
            self.loop.call_later(1.0, self._end)
        else:
            self.transport.close()
