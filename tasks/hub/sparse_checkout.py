"""A repo's files as sparse files of their true sizes, with little more in them than configs, index and headers.

Whatever reads headers and configs of a folder can so read them of a repo, for a few hundred KB of a 54 GB one. The
bytes of chosen tensors can be filled in later. What is not filled in reads as zeros: never read data of a skeleton
but what `fill` has brought.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

from requant.tasks.checkpoint.checkpoint import BESIDE, INDEX, MAX_JSON, SINGLE
from requant.tasks.checkpoint.header import MAX_HEADER, Tensor
from requant.tasks.errors import CheckpointError, HubUnavailable
from requant.tasks.hub.client import hub_errors
from requant.tasks.hub.revision import HubFile, Revision

GUESS = 16 << 10  # bytes: holds the header of most shards, so that one request is enough
PIECE = 1 << 16  # bytes
PARALLEL_DOWNLOADS = 8
PAUSES = (0.5, 1, 2, 4, 0)  # seconds after an answer that was cut short
NEIGHBOURS = 1 << 20  # bytes: a gap between wanted tensors that is cheaper to fetch than to ask around


def create_checkout(
    revision: Revision, folder: Path, near: Callable[[HubFile], Path | None] = lambda file: None
) -> Path:
    """Lay a repo out as a skeleton. `near` says where a file of it lies already: a link leads there, and nothing of it
    is asked for; such a skeleton is for reading alone.

    Raises HubError, HubUnavailable, CheckpointError for an index that is no JSON.
    """
    sizes = {}
    for file in revision.wanted:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        here = near(file)
        if here is not None:
            (folder / file.path).symlink_to(here)
            continue
        sizes[file.path] = file.size
        with (folder / file.path).open("wb") as stream:
            stream.truncate(file.size)
    fetch_files(revision, folder, (p for p in ("config.json", INDEX, *BESIDE) if 0 < sizes.get(p, 0) <= MAX_JSON))
    shards = [shard for shard in _shards(folder) if sizes.get(shard, 0) >= 8]
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        list(pool.map(lambda shard: _fetch_header(revision, folder, shard, sizes[shard]), shards))
    return folder


def fill(revision: Revision, folder: Path, tensors: Iterable[Tensor]) -> None:
    """Fetch the bytes of these tensors into a skeleton's files; neighbours in one request."""
    pieces: list[tuple[str, int, int]] = []
    for tensor in sorted(tensors, key=lambda t: (t.path, t.begin)):
        path = tensor.path.relative_to(folder).as_posix()
        if pieces and pieces[-1][0] == path and tensor.begin - pieces[-1][2] <= NEIGHBOURS:
            pieces[-1] = (path, pieces[-1][1], tensor.end)
        else:
            pieces.append((path, tensor.begin, tensor.end))
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        list(pool.map(lambda piece: _fetch(revision, folder, *piece), pieces))


def fetch_files(revision: Revision, folder: Path, paths: Iterable[str]) -> None:
    """Fetch small files whole into a skeleton."""
    sizes = {file.path: file.size for file in revision.wanted}
    wanted = [path for path in paths if sizes[path]]
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        list(pool.map(lambda path: _fetch(revision, folder, path, 0, sizes[path]), wanted))


def _shards(folder: Path) -> Sequence[str]:
    if not (folder / INDEX).exists():
        return [SINGLE]
    try:
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        return sorted({shard for shard in weight_map.values() if isinstance(shard, str)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the {INDEX} of the repo cannot be read ({error!r}): restore the file") from error


def _fetch_header(revision: Revision, folder: Path, shard: str, size: int) -> None:
    _fetch(revision, folder, shard, 0, min(GUESS, size))
    with (folder / shard).open("rb") as stream:
        end = 8 + int(struct.unpack("<Q", stream.read(8))[0])
    if GUESS < end <= min(size, MAX_HEADER):  # else there is nothing more, or read_header says what is wrong with it
        _fetch(revision, folder, shard, GUESS, end)


def _fetch(revision: Revision, folder: Path, path: str, begin: int, end: int) -> None:
    with (folder / path).open("r+b") as file:
        file.seek(begin)
        for piece in stream(revision, path, begin, end):
            file.write(piece)


def stream(revision: Revision, path: str, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `[begin, end)` of a file, in pieces. What a lost connection has brought is not asked for again, and a
    server that sends the whole file is left after as many bytes. Raises HubError, HubUnavailable."""
    url = hf_hub_url(revision.repo_id, path, revision=revision.sha, repo_type=revision.repo_type)
    headers = {
        **build_hf_headers(library_name="requant"),
        "Accept-Encoding": "identity",
    }  # ranges are of the file itself
    lost = ""
    for pause in PAUSES:
        headers["Range"] = f"bytes={begin}-{end - 1}"
        with (
            hub_errors(revision.repo_id, revision.sha),
            http_stream_backoff("GET", url, headers=headers, follow_redirects=True) as response,
        ):
            hf_raise_for_status(response)
            position = begin if response.status_code == 206 else 0
            lost = "the answer was short"
            try:
                for chunk in response.iter_bytes(PIECE):
                    piece = chunk[max(begin - position, 0) : end - position]
                    position += len(chunk)
                    if piece:
                        begin += len(piece)
                        yield piece
                    if position >= end:
                        return
            except httpx2.HTTPError as error:  # must not reach http_stream_backoff, which would yield a second time
                lost = str(error)
        time.sleep(pause)
    raise HubUnavailable(f"the Hub sent {path} of {revision.name} without its last {end - begin} bytes ({lost})")
