"""The Hub's failures as sentences."""

from __future__ import annotations

import httpx2
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tasks.errors import HubError, HubUnavailable
from tasks.hub.client import PASSING, hub_errors


def http_error(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError, message: str = "as it says") -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub/api")
    return kind(message, response=httpx2.Response(status, request=request), server_message=message)


def explained(error: BaseException) -> HubError:
    with pytest.raises(HubError) as caught, hub_errors("a/b", "main"):
        raise error
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("status", sorted(PASSING))
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
