"""Requests to the Hub from many threads, as fast as its rate limit allows.

The Hub counts requests in windows of 300 s. Every answer has a header with the remaining requests and the seconds until
the next window (`RateLimit: "api";r=12;t=55`, IETF draft-ietf-httpapi-ratelimit-headers). Further requests are refused
with 429, and perhaps `Retry-After`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

import httpx2

from requant.tasks.errors import HubUnavailable
from requant.tasks.hub._http import get_session, parse_ratelimit_headers

PARALLEL_REQUESTS = 16
WINDOW_S = 300.0
MAX_PASS_S = 3 * WINDOW_S
DEFAULT_WAIT_S = 10.0  # after a 429 that does not name a time
T = TypeVar("T")


def requested_wait_s(response: httpx2.Response) -> float | None:
    """Return the seconds to wait that a refusal names: `Retry-After`, or after a 429 the rest of the window."""
    retry_after = response.headers.get("retry-after", "").strip()
    if retry_after.isdecimal():
        return float(retry_after)
    limits = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    return float(limits.reset_in_seconds) if limits else None


class Pace:
    """The pace of requests of all threads: if the Hub asks one of them to wait, all wait.

    `requests` and `refused` count all answers, and those with status 429.
    """

    def __init__(self, max_pass_s: float = MAX_PASS_S) -> None:
        self.requests = self.refused = 0
        self._next_request = time.monotonic()
        self._deadline = self._next_request + max_pass_s
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._hooks = get_session().event_hooks["response"]  # of the one session for all threads

    def __enter__(self) -> Self:
        self._hooks.append(self._read_answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._hooks.remove(self._read_answer)

    def stop(self) -> None:
        """Wake all waiting threads, which then raise HubUnavailable."""
        self._stopped.set()

    def ask(self, question: Callable[[], T]) -> T:
        """Call a function that makes a request. Call it again if the Hub refuses it with 429.

        Raises HubUnavailable if the Hub asks for a longer wait than is left of the pass.
        """
        while True:
            self._wait()
            try:
                return question()
            except HubUnavailable as error:
                response = getattr(error.__cause__, "response", None)
                if getattr(response, "status_code", None) != 429:
                    raise

    def _wait(self) -> None:
        while (left := self._next_request - time.monotonic()) > 0:
            if self._next_request > self._deadline:
                raise HubUnavailable(f"the Hub wants no requests for another {left:.0f} s: try again then")
            if self._stopped.wait(left):
                break
        if self._stopped.is_set():
            raise HubUnavailable("stopped while waiting for the Hub's rate limit")

    def _read_answer(self, response: httpx2.Response) -> None:
        """Take from an answer how long the Hub asks to wait."""
        limits = parse_ratelimit_headers(response.headers)
        wait_s = 0.0
        if response.status_code == 429:
            requested_s = requested_wait_s(response)
            wait_s = max(DEFAULT_WAIT_S if requested_s is None else requested_s, 1.0)
        elif limits is not None and limits.remaining < PARALLEL_REQUESTS:  # other threads may have sent as many
            wait_s = limits.reset_in_seconds
        with self._lock:
            self.requests += 1
            self.refused += response.status_code == 429
            self._next_request = max(self._next_request, time.monotonic() + wait_s)
