"""The webhook relay, served and asked over real connections."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from click.testing import CliRunner

from requant.flows.cli.webhook import webhook
from requant.flows.watching import Pass
from requant.flows.webhook import app as relay_app
from requant.flows.webhook import connection as relay_connection
from requant.flows.webhook import looker as relay_looker
from requant.flows.webhook.app import MAX_BODY_BYTES, create_app
from requant.flows.webhook.connection import Connection
from requant.flows.webhook.looker import Looker
from requant.tasks.errors import RecipeError, StoreUnreachable
from tests.factories.paths import ROOT
from tests.factories.requant import wait_for
from tests.factories.webhook import REPO, payload

SECRET = "sécret-of-the-webhook"
GOOD = {"X-Webhook-Secret": SECRET.encode()}
PAYLOAD = payload()


class Looks:
    """Records what is to be looked at; holds the looker up while `gate` is closed."""

    def __init__(self) -> None:
        self.repos: list[Set[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self, repos: Set[str]) -> Pass:
        self.repos.append(repos)
        self.gate.wait(10)
        if self.error:
            raise self.error
        return Pass(0, (), ())

    def wait_for(self, count: int) -> None:
        wait_for(lambda: len(self.repos) >= count, 30)
        assert len(self.repos) == count


def assert_only_the_next_is_looked_at(client: httpx.Client, looks: Looks) -> None:
    """Nothing that was sent before is looked at, which a payload shows that comes behind it."""
    assert client.post("/hub", json=payload(repo={"name": "the/next"}), headers=GOOD).status_code == 202
    looks.wait_for(1)
    assert looks.repos == [{"the/next"}]


@pytest.fixture
def looks() -> Looks:
    return Looks()


@pytest.fixture
def address(looks: Looks) -> Iterator[tuple[str, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(SECRET, Looker(looks))
    server = uvicorn.Server(uvicorn.Config(app, http=Connection, log_config=None, lifespan="off", limit_concurrency=5))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield listener.getsockname()[:2]
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as made:
        yield made


def test_a_payload_with_the_secret_is_accepted_and_its_repo_looked_at(client: httpx.Client, looks: Looks) -> None:
    answer = client.post("/hub", json=PAYLOAD, headers=GOOD)
    assert (answer.status_code, answer.json()) == (202, {"status": "accepted"})
    looks.wait_for(1)
    assert looks.repos == [{REPO}]
    assert client.get("/health").json() == {"status": "ok"}


def test_a_payload_is_never_sent_on_a_connection_that_is_about_to_be_closed(client: httpx.Client) -> None:
    """The answer says that its connection ends, so that a client opens another one."""
    for changes in ({}, {"event": {"action": "create", "scope": "discussion.comment"}}):
        assert client.post("/hub", json=payload(**changes), headers=GOOD).headers["Connection"] == "close"


@pytest.mark.parametrize("secret", [None, b"", b"wrong", SECRET.encode()[:-1], SECRET.encode() + b"x", b"\xff" * 5000])
def test_without_the_secret_nothing_is_done(secret: bytes | None, client: httpx.Client, looks: Looks) -> None:
    headers = {} if secret is None else {"X-Webhook-Secret": secret}
    answer = client.post("/hub", json=PAYLOAD, headers=headers)
    assert answer.status_code == 401 and "X-Webhook-Secret is missing or not the one" in answer.json()["error"]
    assert_only_the_next_is_looked_at(client, looks)


def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=5) as sock:
        sock.sendall(
            b"POST /hub HTTP/1.1\r\nHost: x\r\nX-Webhook-Secret: " + SECRET.encode() + b"\r\n"
            b"Content-Length: 1000000000000\r\n\r\n{"
        )
        assert b" 413 " in sock.recv(4096).splitlines()[0]


def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(
    address: tuple[str, int], client: httpx.Client, looks: Looks
) -> None:
    """It never ends: the answer comes after little more than MAX_BODY bytes."""
    with socket.create_connection(address, timeout=5) as sock:
        sock.sendall(
            b"POST /hub HTTP/1.1\r\nHost: x\r\nX-Webhook-Secret: " + SECRET.encode() + b"\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
        for _ in range(MAX_BODY_BYTES // 0x1000 + 1):
            sock.sendall(chunk)
        assert b" 413 " in sock.recv(4096).splitlines()[0]
    assert_only_the_next_is_looked_at(client, looks)


def test_a_body_that_does_not_arrive_is_not_waited_for(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_app, "BODY_TIMEOUT_S", 0.2)
    with socket.create_connection(address, timeout=5) as sock:
        sock.sendall(
            b"POST /hub HTTP/1.1\r\nHost: x\r\nX-Webhook-Secret: " + SECRET.encode() + b"\r\nContent-Length: 9\r\n\r\n{"
        )
        assert b" 408 " in sock.recv(4096).splitlines()[0]


@pytest.mark.parametrize(
    "head", [b"", b"POST /hub HTTP/1.1\r\nX-Slow: ", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /"]
)
def test_connections_on_which_nothing_more_is_asked_shut_nobody_out(
    head: bytes, address: tuple[str, int], client: httpx.Client, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is old until the relay has been seen full, however long that takes."""
    full, end = threading.Event(), Connection._end

    def end_once_full(connection: Connection) -> None:
        if full.is_set():
            end(connection)
        else:
            connection.loop.call_later(0.02, connection._end)

    monkeypatch.setattr(relay_connection, "MAX_CONNECTION_AGE_S", 0.02)
    monkeypatch.setattr(Connection, "_end", end_once_full)
    idle = [socket.create_connection(address, timeout=5) for _ in range(4)]
    for sock in idle:
        sock.sendall(head)
    assert client.post("/hub", json=PAYLOAD, headers=GOOD).status_code == 503
    # A connection to come must not be old before its request arrives, which on a busy machine takes some time.
    monkeypatch.setattr(relay_connection, "MAX_CONNECTION_AGE_S", 60.0)
    full.set()
    wait_for(lambda: client.post("/hub", json=PAYLOAD, headers=GOOD).status_code == 202, 30)
    for sock in idle:
        sock.close()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 50_000, b'{"event":{}}',
        json.dumps(payload(repo={"name": "../../etc/passwd"})).encode(),
        json.dumps(payload(repo={"name": "a/b; rm -rf /"})).encode(),
        json.dumps(payload(repo={"name": "a" * 1000})).encode(),
        json.dumps(payload(repo={"name": ["a/b"]})).encode(),
        json.dumps(payload(event={"scope": None})).encode(),
    ],
)  # fmt: skip
def test_what_is_no_payload_is_refused_in_a_sentence(body: bytes, client: httpx.Client, looks: Looks) -> None:
    answer = client.post("/hub", content=body, headers=GOOD)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.startswith("not a payload of the Hub's webhooks, version 3: ") and "\n" not in error
    assert "passwd" not in error and "rm -rf" not in error and len(error) < 400
    assert_only_the_next_is_looked_at(client, looks)


@pytest.mark.parametrize(
    "changes",
    [
        {"event": {"scope": "discussion.comment", "action": "create"}},
        {"event": {"scope": "repo.config"}},
        {"event": {"action": "delete", "scope": "repo"}},
        {"repo": {"type": "dataset"}},
    ],
)
def test_what_moves_no_branch_of_a_model_is_ignored(changes: Any, client: httpx.Client, looks: Looks) -> None:
    answer = client.post("/hub", json=payload(**changes), headers=GOOD)
    assert (answer.status_code, answer.json()) == (202, {"status": "ignored"})
    assert_only_the_next_is_looked_at(client, looks)


def test_payloads_that_come_during_a_pass_wait_for_one_more(client: httpx.Client, looks: Looks) -> None:
    looks.gate.clear()
    client.post("/hub", json=PAYLOAD, headers=GOOD)
    looks.wait_for(1)
    for number in range(30):  # answered while the pass goes on
        assert client.post("/hub", json=payload(repo={"name": f"a/b{number % 3}"}), headers=GOOD).status_code == 202
    looks.gate.set()
    looks.wait_for(2)
    assert looks.repos[1] == {"a/b0", "a/b1", "a/b2"}


def test_too_many_repos_at_once_are_told_to_come_again(
    client: httpx.Client, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_looker, "MAX_WAITING_REPOS", 2)
    looks.gate.clear()
    client.post("/hub", json=PAYLOAD, headers=GOOD)
    looks.wait_for(1)
    statuses = [
        client.post("/hub", json=payload(repo={"name": name}), headers=GOOD).status_code
        for name in ("a/1", "a/2", "a/3", "a/1")
    ]
    assert statuses == [202, 202, 503, 202]
    looks.gate.set()


def test_a_pass_that_fails_is_logged_without_the_secret_and_the_next_one_works(
    client: httpx.Client, looks: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    looks.error = StoreUnreachable("the store is away")
    client.post("/hub", json=PAYLOAD, headers=GOOD)
    looks.wait_for(1)
    looks.error = None
    client.post("/hub", json=PAYLOAD, headers=GOOD)
    looks.wait_for(2)
    assert "nothing was started: the store is away" in caplog.text and SECRET not in caplog.text


ENOUGH = {"REQUANT_WEBHOOK_SECRET": "long-enough-and-more", "PREFECT_API_URL": "http://x/api"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "REQUANT_WEBHOOK_SECRET"),
        ({"REQUANT_WEBHOOK_SECRET": "short"}, "REQUANT_WEBHOOK_SECRET"),
        ({"REQUANT_WEBHOOK_SECRET": "long-enough-and-more"}, "PREFECT_API_URL"),
        ({**ENOUGH, "REQUANT_STORE": "x"}, "REQUANT_STORE"),
    ],
    ids=["no secret", "a short secret", "no server", "no store"],
)
def test_it_does_not_start_without_what_it_needs(settings: dict[str, str], named: str, tmp_path: Path) -> None:
    environment = {"REQUANT_WEBHOOK_SECRET": None, "PREFECT_API_URL": None, **settings}
    done = CliRunner().invoke(webhook, ["--recipes", str(tmp_path)], env=environment)
    assert isinstance(done.exception, RecipeError) and named in str(done.exception)
    assert "long-enough-and-more" not in str(done.exception)


def test_a_folder_of_recipes_that_is_missing_is_one_sentence_of_the_command(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path), **ENOUGH}
    done = subprocess.run(
        [sys.executable, "-m", "requant", "webhook", "--recipes", str(tmp_path / "none")],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none does not exist" in done.stderr
    assert "long-enough-and-more" not in done.stderr
