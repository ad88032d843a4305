"""Download one file of a revision, and hash it on the way. A download that was cut off or killed is resumed.

huggingface_hub resumes a download only within one call. After a kill, it would download the whole file again, with Xet
too: docs/explanation/architecture.md has the figures.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import httpx2
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from requant.tasks.artifact import sha256_of, write_back
from requant.tasks.errors import HubUnavailable
from requant.tasks.hub._http import build_hf_headers, get_session, hf_raise_for_status
from requant.tasks.hub.client import TEMPORARY_STATUSES, hub_errors
from requant.tasks.hub.rate_limit import WINDOW_S, requested_wait_s
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.store.folder import clone

MAX_TRIES = 8  # in a row without a new byte: the pauses of 1, 2, 4, ..., 60 s last two minutes
MAX_PAUSE_S = 60.0  # unless the server names a time
CHUNK_BYTES = 1 << 20
WRITE_BACK_BYTES = 64 << 20
UNSHARED = 0o644  # permissions of files that others may read, and not write
log = logging.getLogger(__name__)


def fetch(base: Revision, file: HubFile, path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """Download a file to `path`, after the bytes that an earlier process has left there. Return the sha256 of the file.

    A file that lies on this machine is copied, as a reflink where the file system can: a hard link would change with
    the original. `advance` is told the bytes that the file has got. The caller must compare the sha256: after a power
    cut, the bytes on the disk may be wrong. A connection that sends nothing for HF_HUB_DOWNLOAD_TIMEOUT seconds (10)
    counts as lost. Raises HubError or HubUnavailable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if base.folder is not None:
        path.unlink(missing_ok=True)
        clone(base.folder / file.path, path, UNSHARED)
        advance(file.size)
        return sha256_of(path)
    with hub_errors(base.repo_id, base.sha), open(path, "ab+", buffering=0, opener=_open_unshared) as stream:
        partial = _PartialFile(stream, file.size, advance)
        if partial.at:
            log.info(f"going on with {file.path} after {partial.at:,} of {file.size:,} bytes")
        url = hf_hub_url(base.repo_id, file.path, repo_type=base.repo_type, revision=base.sha)
        failures = 0
        while partial.at < file.size:
            before = partial.at
            try:
                _request_rest(url, partial)
                error: Exception = HubUnavailable(
                    f"{file.path} of {base.name} ended after {partial.at} of {file.size} bytes: try again later",
                    repo_id=base.repo_id,
                )
            except (httpx2.TransportError, HfHubHTTPError) as raised:
                if not _is_temporary(raised, url):
                    raise
                error = raised
            failures = failures + 1 if partial.at <= before else 1
            if failures >= MAX_TRIES:
                raise error
            if partial.at < file.size:
                pause_s = _choose_pause(error, failures)
                log.info("%s was cut after %d bytes (%s); going on in %.1f s", file.path, partial.at, error, pause_s)
                time.sleep(pause_s)
        return partial.hasher.hexdigest()


def _open_unshared(path: str, flags: int) -> int:
    """Open a file that, whatever the umask, other users cannot write to: they could alter bytes that were hashed."""
    return os.open(path, flags, UNSHARED)


class _PartialFile:
    """A file that is being downloaded, and the hash of the bytes that it has. `at` is their number."""

    def __init__(self, stream: BinaryIO, size: int, advance: Callable[[int], None]) -> None:
        self._stream, self.size, self._advance = stream, size, advance
        self.hasher = hashlib.sha256()
        stream.seek(0)
        while chunk := stream.read(CHUNK_BYTES):
            self.hasher.update(chunk)
        self.at = self._written_back = stream.tell()
        advance(self.at)
        if self.at > size:
            self.start_over()

    def start_over(self) -> None:
        self._stream.truncate(0)
        self._advance(-self.at)
        self.at, self._written_back, self.hasher = 0, 0, hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        if self.at + len(chunk) > self.size:
            raise httpx2.RemoteProtocolError(f"more than {self.size} bytes came")
        view = memoryview(chunk)
        while view:
            view = view[self._stream.write(view) :]
        self.hasher.update(chunk)
        self.at += len(chunk)
        if self.at - self._written_back >= WRITE_BACK_BYTES:
            write_back(self._stream.fileno(), self._written_back, self.at - self._written_back)
            self._written_back = self.at
        self._advance(len(chunk))


def _request_rest(url: str, partial: _PartialFile) -> None:
    """Request the missing bytes. The Hub redirects to another host, to which httpx sends no token."""
    headers = {**build_hf_headers(library_name="requant"), "Accept-Encoding": "identity"}
    if partial.at:
        headers["Range"] = f"bytes={partial.at}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        if response.status_code == 416:
            partial.start_over()
            return
        hf_raise_for_status(response)
        begins = response.headers.get("Content-Range", "bytes 0-").partition("-")[0]
        if begins != f"bytes {partial.at}":
            partial.start_over()  # the server ignores ranges
            if begins != "bytes 0":
                return
        for chunk in response.iter_bytes():  # To collect them into larger ones takes a quarter of the CPU time.
            partial.add(chunk)


def _is_temporary(error: Exception, url: str) -> bool:
    """Check whether the request may succeed later. A 403 may be, as the address of a redirect expires."""
    if not isinstance(error, HfHubHTTPError):
        return True
    elsewhere = error.response.request.url.host != httpx2.URL(url).host
    return error.response.status_code in TEMPORARY_STATUSES or (elsewhere and error.response.status_code == 403)


def _choose_pause(error: Exception, failures: int) -> float:
    """Return the seconds to wait: what the server names, at most one window of the rate limit, or about 1, 2, 4, ..."""
    requested_s = requested_wait_s(error.response) if isinstance(error, HfHubHTTPError) else None
    if requested_s is not None:
        return min(requested_s, WINDOW_S)
    seconds: float = random.uniform(0.75, 1.25) * 2 ** (failures - 1)
    return min(seconds, MAX_PAUSE_S)
