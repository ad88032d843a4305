"""The errors of hf_xet, through which huggingface_hub uploads large files, as sentences.

hf_xet 1.8 raises Python's own exceptions and says in the message what happened: `Network error: Request error: HTTP
status client error (403 Forbidden), domain: http...`. It has asked again by then, five times within six minutes, where
that helps.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from huggingface_hub import constants

from requant.tasks.environment import PROXIES, variables_set
from requant.tasks.errors import HubError, HubUnavailable

# What XetError of xet-core begins with. Those of the first group may pass; files or this machine cause the others.
_PASSING = ("Network error", "Rate limited", "Server error", "Timeout")
_LASTING = (
    "Authentication error", "Configuration error", "Data integrity error", "I/O error", "Internal error", "Not found",
    "Operation cancelled", "Previous task error", "Task error",
)  # fmt: skip
_BEGINNING = re.compile(rf"({'|'.join(_PASSING + _LASTING)}): ")
_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
_ADDRESS = re.compile(r"https?://[^\s()]+")
_WITHOUT = "to upload without Xet, set HF_HUB_DISABLE_XET=1"


def explain_xet(error: BaseException, repo_id: str, temporary_statuses: Collection[int]) -> HubError | None:
    """Return what to raise instead of an error of hf_xet: HubError or HubUnavailable. None for any other error.

    No address is repeated with its path and query: that of a xorb may be signed.
    """
    text = str(error)
    beginning = _BEGINNING.match(text)
    if beginning is None:
        return None
    found, address = _STATUS.search(text), _ADDRESS.search(text)
    status = int(found[1]) if found else None
    path = urlsplit(address[0]).path if address else ""
    where = f"the Hub's Xet storage at {_origin(address[0])}" if address else "the Hub's Xet storage"
    if "/xet-write-token/" in path or "/xet-read-token/" in path:
        return _explain_token_refusal(status, repo_id, temporary_statuses)
    if status in temporary_statuses:
        return HubUnavailable(f"{where} answers {status} for {repo_id}: try again later", repo_id=repo_id)
    if status == 401:  # the Hub gives a new token to each upload
        return HubUnavailable(
            f"{where} refuses the token that the Hub gave for {repo_id} (401): compare this machine's clock with the "
            f"time, and try again; {_WITHOUT}",
            repo_id=repo_id,
        )
    if status is not None:
        return HubError(f"{where} refuses the files of {repo_id} ({status}): {_WITHOUT}", repo_id=repo_id)
    if beginning[1] in _PASSING:
        variables = ", ".join(variables_set(*PROXIES))
        return HubUnavailable(
            f"{where} did not answer: check {f'{variables} and ' if variables else ''}the network, which must let this "
            f"host through beside {constants.ENDPOINT}; {_WITHOUT}",
            repo_id=repo_id,
        )
    said = _ADDRESS.sub(lambda match: _origin(match[0]), text.splitlines()[0])[:300]
    return HubError(
        f"Xet failed for {repo_id} ({said}): check room and permissions in HF_XET_CACHE ({constants.HF_XET_CACHE}); "
        f"{_WITHOUT}",
        repo_id=repo_id,
    )


def _explain_token_refusal(status: int | None, repo_id: str, temporary_statuses: Collection[int]) -> HubError:
    if status == 404:
        return HubError(f"the Hub at {constants.ENDPOINT} gives no access to Xet (404): {_WITHOUT}", repo_id=repo_id)
    if status is None or status in temporary_statuses:
        answer = f"answers {status}" if status else "did not answer"
        return HubUnavailable(
            f"the Hub at {constants.ENDPOINT} {answer} when asked for access to Xet for {repo_id}: try again later",
            repo_id=repo_id,
        )
    return HubError(
        f"this account may not upload to {repo_id} ({status}): set HF_TOKEN to a token with write access to it",
        repo_id=repo_id,
    )


def _origin(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
