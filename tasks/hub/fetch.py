"""Fetches one file of a revision, hashed while it comes; killed or cut anywhere, it goes on where it stopped.

huggingface_hub resumes inside one call only: a killed process starts the file again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from pathlib import Path
from typing import BinaryIO

import httpx2
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from requant.tasks.errors import HubUnavailable
from requant.tasks.hub.client import TEMPORARY_STATUSES, hub_errors
from requant.tasks.hub.revision import HubFile, Revision

MAX_TRIES = 6  # in a row that brought nothing; with the pauses between them, a Hub that is away for 60 s is waited for
MAX_PAUSE_S = 60.0
CHUNK_BYTES = 1 << 20
log = logging.getLogger(__name__)


def fetch(base: Revision, file: HubFile, path: Path) -> str:
    """Bring a file to `path`, behind the bytes that an earlier process left there; the sha256 of the whole.

    The caller compares it: what the disk kept of a machine that lost its power may be anything. A read that brings
    nothing for HF_HUB_DOWNLOAD_TIMEOUT seconds (10) is a lost connection. Raises HubError or HubUnavailable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with hub_errors(base.repo_id, base.sha), open(path, "ab+", buffering=0, opener=_ours) as stream:
        arriving = _Arriving(stream, file.size)
        if arriving.at:
            log.info(f"going on with {file.path} after {arriving.at:,} of {file.size:,} bytes")
        url = hf_hub_url(base.repo_id, file.path, repo_type=base.repo_type, revision=base.sha)
        failed = 0
        while arriving.at < file.size:
            before = arriving.at
            try:
                _go_on(url, arriving)
                error: Exception = HubUnavailable(
                    f"{file.path} of {base.name} ended after {arriving.at} of {file.size} bytes: try again later"
                )
            except (httpx2.TransportError, HfHubHTTPError) as raised:
                if not _passes(raised, url):
                    raise
                error = raised
            failed = failed + 1 if arriving.at <= before else 1
            if failed >= MAX_TRIES:
                raise error
            if arriving.at < file.size:
                pause = _pause(error, failed)
                log.info("%s was cut after %d bytes (%s); going on in %.1f s", file.path, arriving.at, error, pause)
                time.sleep(pause)
        return arriving.hasher.hexdigest()


def _ours(path: str, flags: int) -> int:
    """For no umask writable by others, who could alter what has been hashed already."""
    return os.open(path, flags, 0o644)


class _Arriving:
    """The file as far as it came, and the hash of that."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self.size = stream, size
        self.hasher = hashlib.sha256()
        stream.seek(0)
        while chunk := stream.read(CHUNK_BYTES):
            self.hasher.update(chunk)
        self.at = stream.tell()
        if self.at > size:
            self.start_over()

    def start_over(self) -> None:
        self._stream.truncate(0)
        self.at, self.hasher = 0, hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        if self.at + len(chunk) > self.size:
            raise httpx2.RemoteProtocolError(f"more than {self.size} bytes came")
        view = memoryview(chunk)
        while view:
            view = view[self._stream.write(view) :]
        self.hasher.update(chunk)
        self.at += len(chunk)


def _go_on(url: str, arriving: _Arriving) -> None:
    """Ask for what is missing. The Hub names another host by a redirect, where httpx sends no token."""
    headers = {**build_hf_headers(library_name="requant"), "Accept-Encoding": "identity"}
    if arriving.at:
        headers["Range"] = f"bytes={arriving.at}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        if response.status_code == 416:
            arriving.start_over()
            return
        hf_raise_for_status(response)
        begins = response.headers.get("Content-Range", "bytes 0-").partition("-")[0]
        if begins != f"bytes {arriving.at}":
            arriving.start_over()  # the server knows no ranges
            if begins != "bytes 0":
                return
        for chunk in response.iter_bytes(CHUNK_BYTES):
            arriving.add(chunk)


def _passes(error: Exception, url: str) -> bool:
    """Whether the same request may succeed; the address that the Hub redirects to is valid for some time only."""
    if not isinstance(error, HfHubHTTPError):
        return True
    elsewhere = error.response.request.url.host != httpx2.URL(url).host
    return error.response.status_code in TEMPORARY_STATUSES or (elsewhere and error.response.status_code == 403)


def _pause(error: Exception, failed: int) -> float:
    """Seconds to wait: what the server asks for, or 1, 2, 4 and so on, but never more than a minute."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    seconds = float(asked) if asked.isdigit() else random.uniform(0.75, 1.25) * 2 ** (failed - 1)
    return min(seconds, MAX_PAUSE_S)
