"""A sparse checkout: files with the sizes of a repo's, of which only configs, index and headers are downloaded.

Code that reads headers and configs of a folder can thereby read those of a repo, with a few hundred KB of a repo of
54 GB. `fill` downloads the bytes of chosen tensors. All other bytes read as zeros, and must not be used.
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

from requant.tasks.checkpoint.checkpoint import INDEX, QUANTIZATION_FILES
from requant.tasks.checkpoint.companions import may_be_pointer
from requant.tasks.checkpoint.compat import PROCESSOR
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.other_kinds import MAX_READ_BYTES, explain_other_kind
from requant.tasks.checkpoint.untrusted import MAX_HEADER_BYTES, MAX_JSON_BYTES
from requant.tasks.errors import CheckpointError, HubUnavailable
from requant.tasks.hub._http import build_hf_headers, hf_raise_for_status, http_stream_backoff
from requant.tasks.hub.client import hub_errors
from requant.tasks.hub.revision import HubFile, Revision

FIRST_READ_BYTES = 16 << 10  # most headers are smaller, and need one request
CHUNK_BYTES = 1 << 16
PARALLEL_DOWNLOADS = 8
PAUSES_S = (0.5, 1, 2, 4, 0)  # after answers that were cut off
MAX_GAP_BYTES = 1 << 20  # downloading a gap between two tensors is faster than a second request


def create_checkout(
    revision: Revision, folder: Path, find_local: Callable[[HubFile], Path | None] = lambda file: None
) -> Path:
    """Create a sparse checkout of a revision.

    `find_local` returns the path of a file that is on this machine already. The checkout has a link to it, and must
    then not be written to. Raises HubError, HubUnavailable, or CheckpointError for a repo that is recognized as
    something else than a checkpoint in safetensors.
    """
    listed = {file.path: file.size for file in revision.files}

    def read(path: str) -> bytes:
        return b"".join(stream(revision, path, 0, min(listed[path], MAX_READ_BYTES))) if listed[path] else b""

    if other := explain_other_kind(revision.repo_id, list(listed), read, is_repo=revision.folder is None):
        raise CheckpointError(other)
    return create_placeholders(revision, folder, find_local)


def create_placeholders(
    revision: Revision, folder: Path, find_local: Callable[[HubFile], Path | None] = lambda file: None
) -> Path:
    """Create a sparse checkout of a revision, whatever it is. Raises HubError, HubUnavailable."""
    sizes = {}
    for file in revision.wanted:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        local = find_local(file)
        if local is not None:
            (folder / file.path).symlink_to(local)
            continue
        sizes[file.path] = file.size
        with (folder / file.path).open("wb") as placeholder:
            placeholder.truncate(file.size)
    names = ("config.json", INDEX, PROCESSOR, *QUANTIZATION_FILES)
    configs = (name for name in names if 0 < sizes.get(name, 0) <= MAX_JSON_BYTES)
    pointers = (path for path, size in sizes.items() if may_be_pointer(path, size))
    fetch_files(revision, folder, {*configs, *pointers})
    lying = (path for path in sizes if "/" not in path and path.endswith(".safetensors"))  # An index may not name them.
    shards = [shard for shard in sorted({*_shards(folder), *lying}) if sizes.get(shard, 0) >= 8]
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        list(pool.map(lambda shard: _fetch_header(revision, folder, shard, sizes[shard]), shards))
    return folder


def fill(revision: Revision, folder: Path, tensors: Iterable[Tensor]) -> None:
    """Download the bytes of these tensors into a sparse checkout, with one request for tensors that lie together."""
    ranges: list[tuple[str, int, int]] = []
    for tensor in sorted(tensors, key=lambda t: (t.path, t.begin)):
        path = tensor.path.relative_to(folder).as_posix()
        if ranges and ranges[-1][0] == path and tensor.begin - ranges[-1][2] <= MAX_GAP_BYTES:
            ranges[-1] = (path, ranges[-1][1], tensor.end)
        else:
            ranges.append((path, tensor.begin, tensor.end))
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        list(pool.map(lambda wanted: _fetch(revision, folder, *wanted), ranges))


def fetch_files(revision: Revision, folder: Path, paths: Iterable[str]) -> None:
    """Download whole files into a sparse checkout."""
    sizes = {file.path: file.size for file in revision.wanted}
    wanted = [path for path in paths if sizes[path]]
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        list(pool.map(lambda path: _fetch(revision, folder, path, 0, sizes[path]), wanted))


def _shards(folder: Path) -> Sequence[str]:
    """List the shards that the index names; none if it cannot be read, which Checkpoint.open explains."""
    if not (folder / INDEX).exists():
        return []
    try:
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        return sorted({shard for shard in weight_map.values() if isinstance(shard, str)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _fetch_header(revision: Revision, folder: Path, shard: str, size: int) -> None:
    _fetch(revision, folder, shard, 0, min(FIRST_READ_BYTES, size))
    with (folder / shard).open("rb") as stream:
        end = 8 + int(struct.unpack("<Q", stream.read(8))[0])
    if FIRST_READ_BYTES < end <= min(size, MAX_HEADER_BYTES):  # read_header refuses a longer header
        _fetch(revision, folder, shard, FIRST_READ_BYTES, end)


def _fetch(revision: Revision, folder: Path, path: str, begin: int, end: int) -> None:
    with (folder / path).open("r+b") as file:
        file.seek(begin)
        for chunk in stream(revision, path, begin, end):
            file.write(chunk)


def _read(path: Path, begin: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while chunk := file.read(min(CHUNK_BYTES, end - begin)):
            begin += len(chunk)
            yield chunk


def stream(revision: Revision, path: str, begin: int, end: int) -> Iterator[bytes]:
    """Yield the bytes `[begin, end)` of a file in chunks.

    After a lost connection, only the missing bytes are requested. If a server ignores the range and sends the whole
    file, reading ends at `end`. Raises HubError, HubUnavailable.
    """
    if revision.folder is not None:
        yield from _read(revision.folder / path, begin, end)
        return
    url = hf_hub_url(revision.repo_id, path, revision=revision.sha, repo_type=revision.repo_type)
    headers = {
        **build_hf_headers(library_name="requant"),
        "Accept-Encoding": "identity",  # a range of a compressed answer would have other bytes
    }
    problem = ""
    for pause_s in PAUSES_S:
        headers["Range"] = f"bytes={begin}-{end - 1}"
        with (
            hub_errors(revision.repo_id, revision.sha),
            http_stream_backoff("GET", url, headers=headers, follow_redirects=True) as response,
        ):
            hf_raise_for_status(response)
            position = begin if response.status_code == 206 else 0
            problem = "the answer was short"
            try:
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    wanted = chunk[max(begin - position, 0) : end - position]
                    position += len(chunk)
                    if wanted:
                        begin += len(wanted)
                        yield wanted
                    if position >= end:
                        return
            except httpx2.HTTPError as error:  # http_stream_backoff would retry, and yield a second response
                problem = str(error)
        time.sleep(pause_s)
    raise HubUnavailable(
        f"the Hub sent {path} of {revision.name} without its last {end - begin} bytes ({problem})",
        repo_id=revision.repo_id,
    )
