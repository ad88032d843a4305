"""Asking the Hub as often as it allows, from any number of threads.

The Hub counts requests in windows of 300 s and says in every answer what is left (`RateLimit: "api";r=12;t=55`, IETF
draft-ietf-httpapi-ratelimit-headers); beyond that it refuses with 429, and perhaps `Retry-After`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

import httpx2
from huggingface_hub.utils._http import get_session, parse_ratelimit_headers

from requant.tasks.errors import HubUnavailable

PARALLEL_REQUESTS = 16
PATIENCE_S = 900.0  # seconds in which a pass must have asked everything: three windows
DEFAULT_WAIT_S = 10.0  # seconds to wait after a refusal that does not say for how long
T = TypeVar("T")


class Pace:
    """One clock for all threads that ask: whoever is told to wait, all wait."""

    def __init__(self, patience: float = PATIENCE_S) -> None:
        self.requests = self.refused = 0
        self._open = time.monotonic()
        self._deadline = self._open + patience
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._hooks = get_session().event_hooks["response"]  # huggingface_hub has one session for all threads

    def __enter__(self) -> Self:
        self._hooks.append(self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._hooks.remove(self._heard)

    def stop(self) -> None:
        """Wake all who wait; they get HubUnavailable."""
        self._stopped.set()

    def ask(self, question: Callable[[], T]) -> T:
        """The answer to a question; asked again if it was refused for having come too early.

        Raises HubUnavailable if the Hub wants to be left alone for longer than there is patience.
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
        while (left := self._open - time.monotonic()) > 0:
            if self._open > self._deadline:
                raise HubUnavailable(f"the Hub wants no requests for another {left:.0f} s: try again then")
            if self._stopped.wait(left):
                break
        if self._stopped.is_set():
            raise HubUnavailable("stopped while waiting for the Hub's rate limit")

    def _heard(self, response: httpx2.Response) -> None:
        """Called with every answer: note for how long it asks to be left alone."""
        limits = parse_ratelimit_headers(response.headers)
        told = response.headers.get("retry-after", "").strip()
        seconds = 0.0
        if response.status_code == 429:
            seconds = float(told) if told.isdecimal() else limits.reset_in_seconds if limits else DEFAULT_WAIT_S
            seconds = max(seconds, 1.0)
        elif limits is not None and limits.remaining < PARALLEL_REQUESTS:  # as many may be under way
            seconds = limits.reset_in_seconds
        with self._lock:
            self.requests += 1
            self.refused += response.status_code == 429
            self._open = max(self._open, time.monotonic() + seconds)
