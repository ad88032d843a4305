"""Writes the files of a checkpoint. Data is streamed, and a file gets its name only when it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from requant.tasks.artifact import File
from requant.tasks.checkpoint.config import JsonObject
from requant.tasks.checkpoint.header import CHUNK_BYTES, DTYPE_BITS, Tensor
from requant.tasks.errors import CheckpointError

SLICE_BYTES = 32 << 20
MAX_SHARD_BYTES = 5_000_000_000  # the default of transformers
PARALLEL_SHARDS = 4


@dataclass(frozen=True)
class Computed(Tensor):
    """A tensor that is computed when it is read. `compute` yields its bytes; `chunks` are of the usual size."""

    compute: Callable[[], Iterable[bytes]]

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...], compute: Callable[[], Iterable[bytes]]) -> Computed:
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        return cls(name, dtype, shape, Path(), 0, nbytes, compute)

    def chunks(self) -> Iterator[bytes]:
        computed_bytes, buffer = 0, bytearray()
        for data in self.compute():
            computed_bytes += len(data)
            buffer += data
            while len(buffer) > CHUNK_BYTES:
                yield bytes(buffer[:CHUNK_BYTES])
                del buffer[:CHUNK_BYTES]
        if buffer:
            yield bytes(buffer)
        if computed_bytes != self.nbytes:
            raise ValueError(f"{self.name} was computed with {computed_bytes} bytes, not {self.nbytes}")


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that is synced and renamed to `target` at the end. After an exception nothing is left."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb", buffering=0) as stream:
            yield stream
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(root: Path, path: str, pieces: Iterable[bytes]) -> File:
    """Write the file `root/path` atomically. Returns its size and hash."""
    hasher, size = hashlib.sha256(), 0
    with atomic_file(root / path) as stream:
        for piece in pieces:
            _write(stream, piece)
            hasher.update(piece)
            size += len(piece)
    return File(path, size, hasher.hexdigest())


def _write(stream: BinaryIO, piece: bytes | memoryview) -> None:
    left = memoryview(piece)
    while left:  # an unbuffered stream may write only a part
        left = left[stream.write(left) :]


def json_bytes(document: Any) -> bytes:
    """Serialize JSON as in repos of the Hub: indented by two spaces, keys in their order, a newline at the end."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(root: Path, path: str, document: Any) -> File:
    return write_file(root, path, [json_bytes(document)])


def write_shard(root: Path, path: str, tensors: Sequence[Tensor]) -> File:
    """Write a safetensors file from tensors of other files, chunk by chunk. Returns its size and hash."""
    ordered, header = _lay_out(tensors)
    return write_file(root, path, itertools.chain([header], *(tensor.chunks() for tensor in ordered)))


@dataclass(frozen=True)
class Layout:
    """Files of a checkpoint before they are written: shards with their tensors, and JSON documents, by name.

    A layout needs only headers, so that a plan can say the size of every file that a run will write.
    """

    shards: Mapping[str, Sequence[Tensor]]
    documents: Mapping[str, JsonObject]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file in bytes."""
        shards = {path: len(_lay_out(tensors)[1]) + _nbytes(tensors) for path, tensors in self.shards.items()}
        return shards | {path: len(json_bytes(document)) for path, document in self.documents.items()}

    def write(self, out: Path) -> list[File]:
        """Write the files, several at a time: one thread hashes 0.7 GB/s. Returns their sizes and hashes."""
        with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
            shards = list(pool.map(lambda item: write_shard(out, *item), self.shards.items()))
        return shards + [write_json(out, path, document) for path, document in self.documents.items()]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def place_shard(root: Path, path: str, tensors: Sequence[Tensor]) -> None:
    """Write a safetensors file as `write_shard`, without a hash: the kernel can copy the data."""
    ordered, header = _lay_out(tensors)
    with atomic_file(root / path) as stream:
        _write(stream, header)
        for tensor in ordered:
            if isinstance(tensor, Computed) or not _copied_by_kernel(tensor, stream):
                for chunk in tensor.chunks():
                    _write(stream, chunk)


class Held(NamedTuple):
    """A tensor in memory: its dtype in the spelling of safetensors, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def place_held(target: Path, held: Mapping[str, Held]) -> None:
    """Write a safetensors file from tensors in memory, by name, without a hash."""
    ordered, header = _lay_out([Tensor(name, h.dtype, h.shape, Path(), 0, h.data.nbytes) for name, h in held.items()])
    with atomic_file(target) as stream:
        _write(stream, header)
        for tensor in ordered:
            _write(stream, held[tensor.name].data)


def place_header(root: Path, path: str, tensors: Sequence[Tensor]) -> None:
    """Write a safetensors file of the same size as `place_shard`, with the header alone: its data reads as zeros."""
    ordered, header = _lay_out(tensors)
    with atomic_file(root / path) as stream:
        _write(stream, header)
        stream.truncate(len(header) + _nbytes(ordered))


def _lay_out(tensors: Sequence[Tensor]) -> tuple[list[Tensor], bytes]:
    """Return the tensors in the order of their data, and the bytes in front of the data: length and header.

    Wide dtypes come first, so that every tensor is aligned to the size of its elements. Readers map the file.
    """
    ordered = sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype])
    header = JsonObject(__metadata__={"format": "pt"})
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the reference writer aligns the data to 8 bytes too
    return ordered, struct.pack("<Q", len(raw)) + raw


def _copied_by_kernel(tensor: Tensor, stream: BinaryIO) -> bool:
    """Let the kernel copy a tensor. Returns False, with nothing written, if it cannot.

    While one slice is copied, the slice before is written to the disk and dropped from the page cache. Otherwise the
    copy would evict what a server on this machine has cached; on virtual machines, new pages also cost more time than
    the copying.
    """
    position, target = tensor.begin, stream.fileno()
    before: Future[None] | None = None
    with ThreadPoolExecutor(1) as pool, tensor.path.open("rb") as source:
        while position < tensor.end:
            try:
                copied = os.copy_file_range(source.fileno(), target, min(SLICE_BYTES, tensor.end - position), position)
            except (OSError, AttributeError):  # two file systems, or no Linux
                if position == tensor.begin:
                    return False
                raise
            if not copied:
                raise CheckpointError(
                    f"{tensor.path.name} ends inside {tensor.name}: download the file again",
                    path=tensor.path,
                    tensor=tensor.name,
                )
            if before is not None:
                before.result()
            if tensor.nbytes > SLICE_BYTES:
                before = pool.submit(_drop_from_page_cache, target, source.fileno(), position, copied)
            position += copied
        if before is not None:
            before.result()
    return True


def _drop_from_page_cache(target: int, source: int, position: int, count: int) -> None:
    """Write the target to the disk, and drop what was written and read from the page cache."""
    os.fdatasync(target)
    os.posix_fadvise(target, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(source, position, count, os.POSIX_FADV_DONTNEED)


def split_into_shards(tensors: Iterable[Tensor], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[Tensor]]:
    """Distribute tensors in their order over shards `model-0000i-of-0000n.safetensors` of at most `max_bytes` of data.

    A single shard is not named `model.safetensors`: loaders prefer that name to an index, and would miss an MTP head
    that is added later in a shard of its own.
    """
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def index_of(layout: Mapping[str, Sequence[Tensor]], old: JsonObject | None = None) -> JsonObject:
    """Return the index of shards; `old` as in `index_document`."""
    weight_map = {t.name: shard for shard, tensors in layout.items() for t in tensors}
    return index_document(weight_map, sum(map(_nbytes, layout.values())), old)


def index_document(weight_map: Mapping[str, str], total_size: int, old: JsonObject | None = None) -> JsonObject:
    """Return the content of an index. `total_size`: bytes of all tensors, without the headers of the files.

    Everything else that the `old` index says stays.
    """
    old = old or JsonObject()
    metadata = {**(old.child("metadata") or {}), "total_size": total_size}
    return JsonObject({**old, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
