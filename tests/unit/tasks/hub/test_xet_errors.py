"""What hf_xet says, as sentences."""

from __future__ import annotations

import pytest

from requant.tasks.errors import HubError, HubUnavailable
from requant.tasks.hub.client import hub_errors

HOST = "https://cas.example"
URL = f"{HOST}/v1/xorbs/default/{'a' * 64}?X-Amz-Signature=secret"


def explained(error: Exception) -> HubError:
    with pytest.raises(HubError) as caught, hub_errors("a/b", "main"):
        raise error
    sentence = str(caught.value)
    assert "\n" not in sentence and "secret" not in sentence and "/v1/" not in sentence
    return caught.value


def answered(status: int, url: str = URL, kind: str = "client") -> str:
    return f"Network error: Request error: HTTP status {kind} error ({status} Something), domain: {url}"


@pytest.mark.parametrize(("error", "retryable", "words"), [
    (ConnectionError(f"Network error: error sending request for url ({URL})"), True, "must let this host through"),
    (TimeoutError(f"Timeout: Request error: error sending request for url ({URL})"), True, "did not answer"),
    (ConnectionError(answered(429)), True, "answers 429"),
    (ConnectionError(answered(503, kind="server")), True, "answers 503"),
    (ConnectionError(answered(401)), True, "clock"),
    (ConnectionError(answered(403)), False, "(403)"),
    (ConnectionError(answered(413)), False, "(413)"),
    (ConnectionError(answered(404, "https://hub/api/models/a/b/xet-write-token/main")), False, "no access to Xet"),
    (ConnectionError(answered(403, "https://hub/api/models/a/b/xet-write-token/main")), False, "write access"),
    (ConnectionError(answered(500, "https://hub/api/models/a/b/xet-write-token/main")), True, "answers 500"),
    (OSError("I/O error: No space left on device (os error 28)"), False, "HF_XET_CACHE"),
    (RuntimeError("Internal error: a task panicked\nat line 3"), False, "a task panicked"),
    (PermissionError(f"Authentication error: token refresh failed at {URL}"), False, "token refresh failed"),
])  # fmt: skip
def test_each_error_of_xet_is_a_sentence_and_is_asked_again_where_that_helps(
    error: Exception, retryable: bool, words: str
) -> None:
    explanation = explained(error)
    assert words in str(explanation) and explanation.retryable is retryable
    assert isinstance(explanation, HubUnavailable) is retryable


@pytest.mark.parametrize("error", [
    ConnectionError(f"Network error: Request middleware error: error sending request for url ({URL})"),
    ConnectionError(answered(403)), ConnectionError(answered(404, "https://hub/api/models/a/b/xet-write-token/main")),
])  # fmt: skip
def test_who_cannot_use_xet_is_told_how_to_do_without(error: Exception) -> None:
    assert "set HF_HUB_DISABLE_XET=1" in str(explained(error))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ConnectionError("reset"), RuntimeError("x")])
def test_other_errors_pass_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, hub_errors("a/b"):
        raise error
    assert caught.value is error
