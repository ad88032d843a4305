"""Asking the Hub as often as it allows, against a server that counts."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub.utils import get_session, hf_raise_for_status

from requant.tasks.errors import HubError, HubUnavailable
from requant.tasks.hub import rate_limit as pace_module
from requant.tasks.hub.client import hub_errors
from requant.tasks.hub.rate_limit import PARALLEL_REQUESTS, Pace, requested_wait_s

Answer = tuple[int, dict[str, str]]


class Clock:
    """A clock that stands still until somebody waits: then what is waited for is over at once."""

    def __init__(self) -> None:
        self.now, self.waits = 1000.0, 0
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def event(self) -> threading.Event:
        """An event on this clock."""
        event = threading.Event()

        def wait(seconds: float) -> bool:
            self.wait(seconds)
            return event.is_set()

        event.wait = wait  # type: ignore[method-assign,assignment]
        return event

    def wait(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds
            self.waits += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of every Pace and of the server."""
    made = Clock()
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=made.monotonic))
    monkeypatch.setattr(pace_module, "threading", SimpleNamespace(Lock=threading.Lock, Event=made.event))
    return made


@contextmanager
def answering(answers: Callable[[int], Answer]) -> Iterator[tuple[str, list[float]]]:
    """A server that answers the nth request with answers(n); its address, and when each request came."""
    times: list[float] = []
    lock = threading.Lock()
    now = pace_module.time.monotonic  # the clock of who asks

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                times.append(now())
                status, headers = answers(len(times))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", times
    finally:
        server.shutdown()
        server.server_close()


def get(url: str) -> int:
    with hub_errors("a/b"):
        response = get_session().get(url)
        hf_raise_for_status(response)
    return response.status_code


def test_a_refusal_with_retry_after_is_waited_out_and_the_question_asked_again(clock: Clock) -> None:
    with answering(lambda n: (429, {"Retry-After": "1"}) if n == 1 else (200, {})) as (url, times), Pace() as pace:
        assert pace.ask(lambda: get(url)) == 200
    assert times[1] - times[0] >= 1 and (pace.requests, pace.refused) == (2, 1)


def test_a_refusal_with_a_window_is_waited_out(clock: Clock) -> None:
    refusal = (429, {"RateLimit": '"api";r=0;t=2', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'})
    with answering(lambda n: refusal if n == 1 else (200, {})) as (url, times), Pace() as pace:
        pace.ask(lambda: get(url))
    assert times[1] - times[0] >= 2


def test_a_window_that_ends_is_not_run_into(clock: Clock) -> None:
    """The server allows 60 requests in each window of 2 s, and would refuse more: it refuses none."""
    limit, seconds = 60, 2
    began, taken = clock.now, 0

    def answers(number: int) -> Answer:
        nonlocal began, taken
        now = clock.now
        if now >= began + seconds:
            began, taken = now, 0
        taken += 1
        left = math.ceil(began + seconds - now)
        return 200 if taken <= limit else 429, {"RateLimit": f'"api";r={max(0, limit - taken)};t={left}'}

    with answering(answers) as (url, times), Pace() as pace, ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        list(pool.map(lambda _: pace.ask(lambda: get(url)), range(90)))
    assert (len(times), pace.refused) == (90, 0)
    assert max(b - a for a, b in itertools.pairwise(times)) > 0.2


def test_all_threads_wait_when_one_is_refused(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes once all four wait: a thread that asks meanwhile leaves the others waiting in vain."""
    refused = threading.Event()

    def time_passes() -> None:
        clock.now += 1

    all_wait = threading.Barrier(4, time_passes)

    def wait(seconds: float) -> None:
        refused.set()
        all_wait.wait(10)

    def ask(number: int) -> int:
        assert number == 0 or refused.wait(10)
        return pace.ask(lambda: get(url))

    monkeypatch.setattr(clock, "wait", wait)
    first = answering(lambda n: (429, {"Retry-After": "1"}) if n == 1 else (200, {}))
    with first as (url, times), Pace() as pace, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [200] * 4
    assert [at - times[0] for at in times] == [0, 1, 1, 1, 1]


def test_more_than_there_is_patience_for_is_an_error_at_once(clock: Clock) -> None:
    with answering(lambda n: (429, {"Retry-After": "600"})) as (url, times), Pace(max_pass_s=5) as pace:
        with pytest.raises(HubUnavailable, match="wants no requests for another 600 s"):
            pace.ask(lambda: get(url))
        assert clock.waits == 0 and len(times) == 1


def test_who_waits_is_woken_when_the_pass_is_interrupted() -> None:
    always = answering(lambda n: (429, {"Retry-After": "60"}))
    with always as (url, _), ThreadPoolExecutor(1) as pool, Pace() as pace:
        waiting = pool.submit(pace.ask, lambda: get(url))
        while not pace.refused:
            time.sleep(0.01)
        pace.stop()
        with pytest.raises(HubUnavailable, match="stopped"):
            waiting.result(5)


@pytest.mark.parametrize("status", [404, 500, 503])
def test_another_failure_is_not_asked_again(status: int) -> None:
    with answering(lambda n: (status, {})) as (url, times), Pace() as pace, pytest.raises(HubError):
        pace.ask(lambda: get(url))
    assert len(times) == 1


def test_nothing_is_heard_after_the_end() -> None:
    with answering(lambda n: (200, {})) as (url, _):
        with Pace() as pace:
            pace.ask(lambda: get(url))
        get(url)
    assert pace.requests == 1


@pytest.mark.parametrize(
    ("status", "headers", "wait_s"),
    [
        (429, {"Retry-After": "30", "RateLimit": '"resolvers";r=0;t=120'}, 30.0),
        (429, {"RateLimit": '"resolvers";r=0;t=120'}, 120.0),
        (503, {"Retry-After": "5"}, 5.0),
        (503, {"RateLimit": '"resolvers";r=0;t=120'}, None),
        (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        (429, {}, None),
    ],
)
def test_the_time_that_an_answer_asks_to_wait(status: int, headers: dict[str, str], wait_s: float | None) -> None:
    assert requested_wait_s(httpx2.Response(status, headers=headers)) == wait_s
