"""The client of the Hub: HfApi with a time-out for every request, and its errors as sentences.

huggingface_hub reads HF_ENDPOINT and HF_TOKEN.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import httpx2
from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

from requant.tasks.environment import PROXIES, variables_set
from requant.tasks.errors import HubError, HubUnavailable, redact
from requant.tasks.http import CLIENT_ERRORS, no_client
from requant.tasks.hub._http import default_client_factory
from requant.tasks.hub.xet_errors import explain_xet
from requant.tasks.progress import shows_bars

TEMPORARY_STATUSES = {408, 425, 429, 500, 502, 503, 504}
# hf_xet writes down every so often what it has uploaded (20 s by default), and goes on from there after a kill.
os.environ.setdefault("HF_XET_DATA_SESSION_XORB_METADATA_FLUSH_INTERVAL", "1s")
STALL_TIMEOUT_S = 60.0  # between two bytes of an answer; huggingface_hub sets no limit for uploads and commits


def _client() -> httpx2.Client:
    try:
        client = default_client_factory()
    except (*CLIENT_ERRORS, httpx2.InvalidURL) as error:
        raise HubError(no_client(error, "the Hub")) from error
    client.timeout = httpx2.Timeout(STALL_TIMEOUT_S, connect=10.0)
    return client


set_client_factory(_client)
# A card without a license is the author's choice, which `publish` tells in a sentence.
warnings.filterwarnings("ignore", message="Warnings while validating metadata in README.md")


if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # Otherwise the user has chosen.
    disable_progress_bars()


def hub_api() -> HfApi:
    return HfApi(library_name="requant")


@contextlib.contextmanager
def upload_bars() -> Iterator[None]:
    """Show huggingface_hub's own bars in this block, on a terminal that has bars: nobody else can count an upload."""
    if not shows_bars() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    enable_progress_bars()
    try:
        yield
    finally:
        disable_progress_bars()


@contextlib.contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the errors that huggingface_hub raises inside the block into HubError or HubUnavailable."""
    name = f"{repo_id}@{revision}" if revision else repo_id
    try:
        yield
    except HfHubHTTPError as error:
        raise _explain(error, repo_id, name) from error
    except (LocalEntryNotFoundError, RuntimeError) as error:
        # huggingface_hub raises the first for failed HEAD requests, and the second for failed LFS uploads.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _explain(error.__cause__, repo_id, name) from error
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            raise HubError(switched_off(name), repo_id=repo_id) from error
        if isinstance(error.__cause__, httpx2.HTTPError) or isinstance(error, LocalEntryNotFoundError):
            raise HubUnavailable(_unanswered(error.__cause__ or error), repo_id=repo_id) from error
        if (explained := explain_xet(error, repo_id, TEMPORARY_STATUSES)) is not None:
            raise explained from error
        raise
    except OfflineModeIsEnabled as error:  # is an OSError too, and so must come first
        raise HubError(switched_off(name), repo_id=repo_id) from error
    except OSError as error:
        if "Consistency check failed" in str(error):  # fewer bytes arrived than the Hub had announced
            raise HubUnavailable(f"{name}: {_first_line(error)}", repo_id=repo_id) from error
        if (explained := explain_xet(error, repo_id, TEMPORARY_STATUSES)) is not None:
            raise explained from error
        raise
    except HFValidationError as error:
        raise HubError(f"{name} cannot be asked for: {_first_line(error)}", repo_id=repo_id) from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise HubError(_unanswered(error), repo_id=repo_id) from error
    except httpx2.HTTPError as error:
        raise HubUnavailable(_unanswered(error), repo_id=repo_id) from error


def _unanswered(error: BaseException) -> str:
    variables = ", ".join(["HF_ENDPOINT", *variables_set(*PROXIES)])
    return f"the Hub at {constants.ENDPOINT} did not answer ({_first_line(error)}): check {variables} and the network"


def offline_variable() -> str:
    """Return the variable that switches the Hub off, with its value. huggingface_hub reads both, in this order."""
    variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    return f"{variable}={os.environ[variable]}" if variable in os.environ else variable


def switched_off(name: str) -> str:
    """Return a sentence that names the variable that switches the Hub off, and what to do."""
    said = offline_variable()
    return (
        f"{name} lies on the Hub, which {said} switches off: unset {said.partition('=')[0]}, name a commit that is in "
        "the cache of huggingface_hub, or in the store and on this machine, or a local folder where the command takes "
        "one"
    )


def _explain(error: HfHubHTTPError, repo_id: str, name: str) -> HubError:
    status = error.response.status_code
    if status in TEMPORARY_STATUSES:
        return HubUnavailable(
            f"the Hub at {constants.ENDPOINT} answers {status} for {name}: try again later", repo_id=repo_id
        )
    if isinstance(error, GatedRepoError):
        return HubError(
            f"{repo_id} is gated and this account has no access: accept its terms at "
            f"{constants.ENDPOINT}/{repo_id} and {_token_of('that account')}",
            repo_id=repo_id,
        )
    if status == 401 and any(words in str(error).lower() for words in ("credential", "invalid user token")):
        return HubError(
            f"the Hub at {constants.ENDPOINT} refuses HF_TOKEN: set it to a valid token, or unset it", repo_id=repo_id
        )
    if isinstance(error, RepositoryNotFoundError):
        return HubError(
            f"{repo_id} does not exist at {constants.ENDPOINT}, or is private: correct the repo_id, or "
            f"{_token_of('an account that may read it')}",
            repo_id=repo_id,
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{name} does not exist: use a branch, tag or commit of {repo_id}", repo_id=repo_id)
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError(f"a file of {name} is gone from the Hub: resolve the revision again", repo_id=repo_id)
    if status in {401, 403}:
        return HubError(
            f"this account may not do that with {repo_id} ({status}): set HF_TOKEN to a token with write access to it",
            repo_id=repo_id,
        )
    if status == 404:
        return HubError(
            f"{name} does not exist at {constants.ENDPOINT}, or this account may not see it: correct it",
            repo_id=repo_id,
        )
    if status == 412:
        return HubError(f"{repo_id} was changed by someone else meanwhile: look at it, then run again", repo_id=repo_id)
    return HubError(f"the Hub refused {name} ({status}): {_first_line(error)}", repo_id=repo_id)


def _token_of(account: str) -> str:
    """Say how to use the token of an account, and that there is none at hand."""
    if get_token() is None:
        return f"log in with hf auth login or set HF_TOKEN, since no token is set, to use one of {account}"
    return f"set HF_TOKEN to a token of {account}"


def _first_line(error: BaseException) -> str:
    text = (getattr(error, "server_message", None) or str(error) or type(error).__name__).strip()
    return redact(text.splitlines()[0][:300])
