"""Faults that the Hub stand-in makes on demand, as the real client meets them."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from infra.dev.hub.app import create_app
from infra.dev.hub.hub import Hub
from infra.dev.hub.launch import HubStandIn
from infra.dev.hub.seeding import Seed, seed
from tests.factories.hub_client import WEIGHTS, add, commit, read
from tests.factories.requant import wait_for

MEBIBYTE = 2**20


def test_a_download_that_is_cut_twice_resumes_where_it_was(
    hub: HubStandIn, api: HfApi, folder: Path, tmp_path: Path
) -> None:
    weights = os.urandom(32 * MEBIBYTE)
    (folder / "model.safetensors").write_bytes(weights)
    hub.seed("base/cut", folder)
    hub.fault("model.safetensors", method="GET", cut_after_bytes=15 * MEBIBYTE, times=2)
    assert read(api, "base/cut", "model.safetensors", tmp_path) == weights
    gets = [exchange for exchange in hub.traffic() if exchange["method"] == "GET"]
    # The client keeps what it received in whole chunks of 10 MiB.
    assert [(get["status"], get["bytes_out"] // MEBIBYTE) for get in gets] == [
        (200, 15),
        (206, 15),
        (206, 12),
    ]


def test_a_server_error_is_tried_again(hub: HubStandIn, api: HfApi, repo: str) -> None:
    hub.reset_traffic()
    hub.fault("preupload", status=500, times=2)
    hub.fault("objects/batch", status=429, retry_after=0)
    commit(api, repo, add("x.bin"))
    statuses = [exchange["status"] for exchange in hub.traffic()]
    assert statuses == [500, 500, 200, 429, 200, 200, 200, 200]


def test_an_upload_that_is_cut_is_sent_again(hub: HubStandIn, api: HfApi, repo: str, tmp_path: Path) -> None:
    hub.fault("part=2", method="PUT", cut_request_after_bytes=1000)
    commit(api, repo, add("model.safetensors", WEIGHTS))
    parts = [exchange for exchange in hub.traffic() if exchange["method"] == "PUT"]
    assert [part["status"] for part in parts] == [200, 0, 200, 200]
    assert read(api, repo, "model.safetensors", tmp_path) == WEIGHTS


def test_an_upload_that_is_corrupted_is_refused(hub: HubStandIn, api: HfApi, repo: str) -> None:
    hub.fault("_lfs/", method="PUT", corrupt=True)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'x.bin'") as caught:
        commit(api, repo, add("x.bin"))
    assert isinstance(caught.value.__cause__, HfHubHTTPError)
    assert caught.value.__cause__.response.status_code == 400


def test_a_download_that_is_corrupted_differs_in_one_bit(
    hub: HubStandIn, api: HfApi, folder: Path, tmp_path: Path
) -> None:
    hub.seed("base/corrupt", folder)
    hub.fault("resolve/.*config.json", method="GET", corrupt=True)
    assert read(api, "base/corrupt", "config.json", tmp_path) == b'z"model_type": "tiny"}'


def test_the_answer_to_a_commit_can_be_lost(hub: HubStandIn, api: HfApi, repo: str) -> None:
    hub.fault("/commit/", method="POST", cut_after_bytes=0)
    with pytest.raises(Exception, match="closed connection"):
        commit(api, repo, add("a"))
    assert "a" in api.list_repo_files(repo)


def connected(hub: HubStandIn, repo: str) -> socket.socket:
    """Return a connection over which the creation of a branch was requested."""
    sock = socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2])))
    head = f"POST /api/models/{repo}/branch/asked HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {hub.token}\r\n"
    sock.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    return sock


def branches(api: HfApi, repo: str) -> list[str]:
    return sorted(branch.name for branch in api.list_repo_refs(repo).branches)


def test_a_request_can_be_held_until_its_client_is_gone_or_the_faults_are_cleared(
    hub: HubStandIn, api: HfApi, repo: str
) -> None:
    """Check that a request whose client is gone is not carried out: the next one creates the branch."""
    hub.fault("/branch/", hold_request=True, times=2)
    hub.reset_traffic()
    with connected(hub, repo):
        wait_for(hub.traffic)
        assert branches(api, repo) == ["main"] and hub.traffic()[0]["status"] == 0
    hub.reset_traffic()
    with connected(hub, repo) as waiting:
        wait_for(hub.traffic)
        hub.clear_faults()
        assert b" 200 " in waiting.recv(4096).splitlines()[0]
    assert branches(api, repo) == ["asked", "main"]


def test_the_answer_to_what_was_carried_out_can_be_held_until_the_faults_are_cleared(
    hub: HubStandIn, api: HfApi, repo: str
) -> None:
    hub.fault("/branch/", hold_after_bytes=0)
    hub.reset_traffic()
    with connected(hub, repo) as waiting:
        wait_for(lambda: hub.traffic()[0]["status"])
        assert branches(api, repo) == ["asked", "main"]
        waiting.setblocking(False)
        with pytest.raises(BlockingIOError):
            waiting.recv(1)
        waiting.setblocking(True)
        hub.clear_faults()
        assert b" 200 " in waiting.recv(4096).splitlines()[0]


def test_an_answer_can_be_held_in_the_middle(hub: HubStandIn, folder: Path) -> None:
    hub.seed("base/held", folder)
    hub.fault("resolve/.*safetensors", method="GET", hold_after_bytes=1000)
    with httpx.stream("GET", hf_hub_url("base/held", "model.safetensors", endpoint=hub.url)) as answer:
        pieces = answer.iter_raw()
        assert len(next(pieces)) == 1000 and hub.traffic()[-1]["bytes_out"] == 1000
        hub.clear_faults()
        assert sum(map(len, pieces)) == len(WEIGHTS) - 1000


def test_a_fault_lets_as_many_requests_through_first_as_it_is_told(hub: HubStandIn, folder: Path) -> None:
    hub.seed("base/skip", folder)
    url = hf_hub_url("base/skip", "model.safetensors", endpoint=hub.url)
    hub.fault("base/skip", status=503, skip=2)
    assert [httpx.get(url).status_code for _ in range(4)] == [200, 200, 503, 200]


def test_answers_can_be_slow_and_late(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the pauses of the stand-in instead of making them."""
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("infra.dev.hub.faults.asyncio", SimpleNamespace(sleep=pause, Event=asyncio.Event))
    hub = Hub(tmp_path / "state")
    seed(hub, Seed(repo_id="base/slow", folder=folder))
    app = create_app(hub)

    async def ask(method: str, **fault: Any) -> bytes:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://hub") as client:
            await client.post("/_standin/faults", json={"path_regex": "base/slow", **fault})
            pauses.clear()
            return (await client.request(method, "/base/slow/resolve/main/model.safetensors")).content

    assert asyncio.run(ask("GET", bytes_per_second=600_000)) == WEIGHTS
    assert len(pauses) > 4 and 0.35 < sum(pauses) <= len(WEIGHTS) / 600_000
    asyncio.run(ask("HEAD", delay=0.3))
    assert sum(pauses) == 0.3
