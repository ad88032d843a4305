"""The Hub's failures as sentences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx2
import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled

from requant.tasks.errors import HubError, HubUnavailable
from requant.tasks.hub.client import TEMPORARY_STATUSES, hub_errors, upload_bars
from requant.tasks.hub.revision import resolve
from requant.tasks.progress import Display


def http_error(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError, message: str = "as it says") -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub/api")
    return kind(message, response=httpx2.Response(status, request=request), server_message=message)


def explained(error: BaseException) -> HubError:
    with pytest.raises(HubError) as caught, hub_errors("a/b", "main"):
        raise error
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("status", sorted(TEMPORARY_STATUSES))
def test_a_server_that_is_busy_or_broken_is_asked_again(status: int) -> None:
    error = explained(http_error(status))
    assert isinstance(error, HubUnavailable) and error.retryable and str(status) in str(error)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 422])
def test_a_refusal_is_not_asked_again(status: int) -> None:
    assert not explained(http_error(status)).retryable


def test_each_refusal_says_what_to_do() -> None:
    assert "accept its terms" in str(explained(http_error(403, GatedRepoError)))
    assert "correct the repo_id" in str(explained(http_error(404, RepositoryNotFoundError)))
    assert "a/b@main does not exist" in str(explained(http_error(404, RevisionNotFoundError)))
    assert "write access" in str(explained(http_error(403)))
    assert "changed by someone else" in str(explained(http_error(412)))
    assert "refuses HF_TOKEN" in str(explained(http_error(401, message="Invalid credentials in Authorization header")))


@pytest.mark.parametrize(
    "error", [httpx2.ConnectError("refused"), httpx2.ReadTimeout("slow"), LocalEntryNotFoundError("no connection")]
)
def test_a_lost_connection_is_asked_again(error: Exception) -> None:
    assert explained(error).retryable


def test_a_failure_that_was_masked_is_unmasked() -> None:
    for mask in (LocalEntryNotFoundError("offline"), RuntimeError("upload failed")):
        mask.__cause__ = http_error(503)
        assert explained(mask).retryable
        mask.__cause__ = http_error(404, RepositoryNotFoundError)
        assert not explained(mask).retryable


def test_a_file_that_arrived_short_is_fetched_again() -> None:
    assert explained(OSError("Consistency check failed: file should be of size 5 but has size 3")).retryable


def test_an_impossible_repo_id_is_a_sentence() -> None:
    assert "cannot be asked for" in str(explained(HFValidationError("Repo id must be in the form\n'namespace/name'")))


def test_a_token_in_the_servers_answer_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in str(explained(http_error(422, message="bad token hf_secret")))


@pytest.mark.parametrize("error", [KeyError("bug"), RuntimeError("bug"), OSError(5, "Input/output error")])
def test_what_is_not_the_hubs_fault_passes_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, hub_errors("a/b"):
        raise error
    assert caught.value is error


@pytest.fixture
def fresh_session() -> Iterator[None]:
    """The next request makes a client, from what the environment says then."""
    close_session()
    yield
    close_session()


@pytest.mark.usefixtures("fresh_session")
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_hub_that_is_switched_off_is_a_sentence_that_names_the_variable(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub's own error is a ConnectionError, as a lost connection is."""
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read when it was imported
    with pytest.raises(HubError) as caught:
        resolve("a/b", "v2")
    assert str(caught.value) == (
        f"a/b@v2 lies on the Hub, which {variable}=1 switches off: unset {variable}, name a commit that is in the "
        "cache of huggingface_hub, or in the store and on this machine, or a local folder where the command takes one"
    )
    assert not caught.value.retryable


@pytest.mark.usefixtures("fresh_session")
def test_an_address_that_is_none_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://[", "http://hub:port", "huggingface.co"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        with pytest.raises(HubError, match="check HF_ENDPOINT"):
            resolve("a/b")


@pytest.mark.usefixtures("fresh_session")
@pytest.mark.parametrize(("variable", "value"), [
    ("HTTPS_PROXY", "ftp://proxy.example"), ("http_proxy", "http://proxy:port"), ("SSL_CERT_FILE", "/none/ca.pem"),
])  # fmt: skip
def test_a_setting_with_which_the_hub_cannot_be_asked_is_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(HubError, match=rf"the Hub cannot be asked \(.*correct or unset .*{variable}"):
        resolve("a/b")


@pytest.mark.usefixtures("fresh_session")
def test_a_hub_out_of_reach_behind_a_proxy_is_a_sentence_that_names_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    with pytest.raises(HubError, match=r"check HF_ENDPOINT, .*HTTP_PROXY.* and the network"):
        resolve("a/b")


@pytest.mark.parametrize(("display", "shown"), [("bars", True), ("lines", False), ("nothing", False)])
def test_an_upload_has_the_bars_of_huggingface_hub_where_the_terminal_has_bars(
    display: Display, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("requant.tasks.progress._display", display)
    assert are_progress_bars_disabled()
    with contextlib.suppress(ZeroDivisionError), upload_bars():
        assert are_progress_bars_disabled() is not shown
        raise ZeroDivisionError
    assert are_progress_bars_disabled()
