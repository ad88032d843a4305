"""The pauses between the requests for one file."""

from __future__ import annotations

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from requant.tasks.hub.fetch import MAX_TRIES, _choose_pause


def refused(status: int, **headers: str) -> HfHubHTTPError:
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("GET", "http://hub/a"))
    return HfHubHTTPError("refused", response=response)


@pytest.mark.parametrize(
    ("headers", "pause_s"),
    [
        ({"RateLimit": '"resolvers";r=0;t=120'}, 120.0),
        ({"RateLimit": '"resolvers";r=0;t=86400'}, 300.0),
        ({"Retry-After": "86400"}, 300.0),
    ],
)
def test_a_download_waits_until_the_next_window_of_the_rate_limit(headers: dict[str, str], pause_s: float) -> None:
    assert _choose_pause(refused(429, **headers), failures=1) == pause_s


def test_the_pauses_outlast_an_outage_of_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requant.tasks.hub.fetch.random.uniform", lambda low, high: low)
    lost = httpx2.ConnectError("refused")
    assert sum(_choose_pause(lost, failures) for failures in range(1, MAX_TRIES)) >= 60
