"""What the user's environment says of proxies and modules, beside what processes of ours need."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator

import httpx
import httpx2
import pytest
import requests

from requant.flows.embedded import check_server
from requant.startup import NO_TELEMETRY
from requant.tasks.environment import bypass_proxy_on_loopback, with_package
from requant.tasks.errors import RequantError
from requant.tasks.http import is_loopback
from requant.tasks.serving.client import Server
from requant.tasks.serving.vllm import find_server
from tests.factories.answers import Answers, answers
from tests.factories.paths import ROOT

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxy() -> Iterator[Answers]:
    """A proxy of a company, which reaches no server on this machine."""
    with answers(403, b"forbidden") as server:
        yield server


@pytest.fixture
def ours() -> Iterator[Answers]:
    """A server on loopback: healthy, as Prefect's and vLLM's are."""
    with answers(200, b"true") as server:
        yield server


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower() in VARIABLES:
            monkeypatch.delenv(name)


CLIENTS: dict[str, Callable[[str], object]] = {
    "httpx": lambda url: httpx.get(url),  # Prefect's, and ours
    "httpx2": lambda url: httpx2.get(url),  # the Hub's
    "requests": lambda url: requests.get(url, timeout=10),
    "urllib": lambda url: urllib.request.urlopen(url, timeout=10).read(),
}
USERS: list[dict[str, str]] = [
    {},
    {"no_proxy": ""},
    {"NO_PROXY": "corp.example"},
    {"no_proxy": "corp.example"},
    {"no_proxy": "corp.example", "NO_PROXY": "other.example"},
    {"No_Proxy": "corp.example"},
]


VARIABLES_AND_USERS = [
    pytest.param(
        variable, user, marks=[pytest.mark.slow] if user and variable != "HTTP_PROXY" else [], id=f"{variable} {user}"
    )
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY")
    for user in USERS
]


@pytest.mark.parametrize(("variable", "user"), VARIABLES_AND_USERS)
def test_no_client_sends_what_is_for_loopback_through_a_proxy_and_all_else_still_goes_there(
    variable: str, user: dict[str, str], proxy: Answers, ours: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {variable: proxy.url, **user}.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    bypass_proxy_on_loopback(environment)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, environment[name])
    for name, client in CLIENTS.items():
        client(f"{ours.url}/{name}")
        client(f"http://localhost:{ours.server_port}/{name}")
    assert proxy.asked == [] and len(ours.asked) == 2 * len(CLIENTS)
    httpx.get("http://hub.example/api")
    httpx2.get("http://hub.example/api")
    assert proxy.asked == ["http://hub.example/api"] * 2


def test_what_the_user_keeps_from_the_proxy_stays_kept() -> None:
    environment = {"HTTP_PROXY": "http://p", "no_proxy": "corp.example, 10.0.0.1", "NO_PROXY": "other.example"}
    bypass_proxy_on_loopback(environment)
    assert environment["no_proxy"] == "corp.example, 10.0.0.1,127.0.0.1,localhost,::1"
    assert environment["NO_PROXY"] == "other.example,127.0.0.1,localhost,::1"
    again = dict(environment)
    bypass_proxy_on_loopback(again)
    assert again == environment


@pytest.mark.parametrize("user", [{"no_proxy": "*"}, {"NO_PROXY": "corp.example, *"}], ids=str)
def test_a_star_is_enough(user: dict[str, str]) -> None:
    environment = {"http_proxy": "http://p", **user}
    bypass_proxy_on_loopback(environment)
    assert environment == {"http_proxy": "http://p", **dict.fromkeys(("no_proxy", "NO_PROXY"), *user.values())}


def test_names_are_compared_as_hosts_are_whatever_their_case() -> None:
    environment = {"https_proxy": "http://p", "NO_PROXY": "LocalHost,127.0.0.1"}
    bypass_proxy_on_loopback(environment)
    assert environment["NO_PROXY"] == environment["no_proxy"] == "LocalHost,127.0.0.1,::1"


def test_without_a_proxy_nothing_is_said_of_one() -> None:
    environment = {"HOME": "/root", "HTTP_PROXY": ""}
    bypass_proxy_on_loopback(environment)
    assert environment == {"HOME": "/root", "HTTP_PROXY": ""}


@pytest.mark.parametrize(("url", "expected"), [
    ("http://127.0.0.1:4200/api", True), ("http://LOCALHOST:1", True), ("http://[::1]:8000", True),
    ("http://127.1.2.3", True), ("http://prefect:4200/api", False), ("https://127.0.0.1.example", False),
    ("nonsense", False), ("http://[", False),
])  # fmt: skip
def test_an_address_is_loopback_or_not(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected


def test_servers_of_this_machine_are_asked_without_a_proxy_in_a_worker_too(
    proxy: Answers, ours: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of Prefect's starts our flows, and not our command line."""
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    here = f"http://localhost:{ours.server_port}"
    check_server(f"{here}/api")
    with pytest.raises(RequantError, match="names no model"):
        find_server(here, chat=False)
    assert ours.asked == ["/api/health", "/v1/models"] and proxy.asked == []
    assert not Server(here, "m", chat=False).client().trust_env
    with pytest.raises(RequantError, match="answers 403"):
        check_server("http://prefect.example/api")
    assert proxy.asked == ["http://prefect.example/api/health"]


def test_the_process_of_a_worker_exempts_loopback_and_telemetry_for_whatever_it_starts() -> None:
    names = ("no_proxy", "NO_PROXY", *NO_TELEMETRY)
    code = f"import os, requant.flows.requantize; print(*(os.environ[name] for name in {names}))"
    environment = with_package({**os.environ, "ALL_PROXY": "http://proxy.example"})
    environment = {name: value for name, value in environment.items() if name not in NO_TELEMETRY}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["127.0.0.1,localhost,::1"] * 2 + list(NO_TELEMETRY.values())


@pytest.mark.parametrize(("variable", "value"), [
    ("HTTPS_PROXY", "ftp://proxy.example"), ("HTTP_PROXY", "http://proxy:port"), ("SSL_CERT_FILE", "/none/ca.pem"),
])  # fmt: skip
def test_a_setting_with_which_no_connection_can_be_made_is_a_sentence_that_names_it(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RequantError, match=f"correct or unset .*{variable}"):
        check_server("http://prefect.example/api")


def test_certificates_of_the_users_hold_for_a_server_on_this_machine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/none/ca.pem")
    with pytest.raises(RequantError, match=r"https://localhost:4200/api cannot be asked \(.*SSL_CERT_FILE"):
        check_server("https://localhost:4200/api")


def test_modules_of_the_users_stay_behind_ours() -> None:
    assert with_package({})["PYTHONPATH"] == str(ROOT)
    assert with_package({"PYTHONPATH": "/a:/b", "HOME": "/"}) == {"PYTHONPATH": f"{ROOT}:/a:/b", "HOME": "/"}
