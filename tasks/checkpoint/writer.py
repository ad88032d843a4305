"""Writes checkpoint files: streamed, hashed on the way, whole or not at all."""

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
from typing import Any, BinaryIO

from requant.tasks.artifact import File
from requant.tasks.checkpoint.header import COPY_CHUNK, DTYPE_BITS, Tensor
from requant.tasks.errors import CheckpointError

SLICE = 32 << 20  # bytes
MAX_SHARD = 5_000_000_000  # bytes, as transformers splits


@dataclass(frozen=True)
class Computed(Tensor):
    """A tensor that lies in no file yet: `compute` makes its bytes, whole rows at a time, when they are read. They come
    in chunks as a file's do. `path` is where it will lie."""

    compute: Callable[[], Iterable[bytes]]

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...], compute: Callable[[], Iterable[bytes]]) -> Computed:
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        return cls(name, dtype, shape, Path(), 0, nbytes, compute)

    def chunks(self) -> Iterator[bytes]:
        made, held = 0, bytearray()
        for data in self.compute():
            made += len(data)
            held += data
            while len(held) > COPY_CHUNK:
                yield bytes(held[:COPY_CHUNK])
                del held[:COPY_CHUNK]
        if held:
            yield bytes(held)
        if made != self.nbytes:
            raise ValueError(f"{self.name} was computed with {made} bytes, not {self.nbytes}")


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A stream into a temporary file that is synced and gets its name at the end; on an exception nothing is left."""
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
    """Write `root/path` whole or not at all, and describe it."""
    hasher, size = hashlib.sha256(), 0
    with whole_file(root / path) as stream:
        for piece in pieces:
            _write(stream, piece)
            hasher.update(piece)
            size += len(piece)
    return File(path, size, hasher.hexdigest())


def _write(stream: BinaryIO, piece: bytes) -> None:
    left = memoryview(piece)
    while left:  # an unbuffered stream may take a part
        left = left[stream.write(left) :]


def json_bytes(document: Any) -> bytes:
    """JSON the way the Hub's repos have it: two spaces, a newline at the end, order kept."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(root: Path, path: str, document: Any) -> File:
    return write_file(root, path, [json_bytes(document)])


def write_shard(root: Path, path: str, tensors: Sequence[Tensor]) -> File:
    """Write one safetensors file from tensors that lie in other files. Memory stays at one chunk."""
    ordered, header = _lay_out(tensors)
    return write_file(root, path, itertools.chain([header], *(tensor.chunks() for tensor in ordered)))


@dataclass(frozen=True)
class Layout:
    """Files of a checkpoint before they are written: shards with their tensors, JSON documents by name.

    Made from headers alone, so that a plan knows every byte of what a run will write.
    """

    shards: Mapping[str, Sequence[Tensor]]
    documents: Mapping[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, as it will be written."""
        shards = {path: len(_lay_out(tensors)[1]) + _nbytes(tensors) for path, tensors in self.shards.items()}
        return shards | {path: len(json_bytes(document)) for path, document in self.documents.items()}

    def write(self, out: Path) -> list[File]:
        """Write and describe them."""
        shards = [write_shard(out, path, tensors) for path, tensors in self.shards.items()]
        return shards + [write_json(out, path, document) for path, document in self.documents.items()]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def place_shard(root: Path, path: str, tensors: Sequence[Tensor]) -> None:
    """The same for a folder that no manifest describes: without a hash, and the kernel does the copying."""
    ordered, header = _lay_out(tensors)
    with whole_file(root / path) as stream:
        _write(stream, header)
        for tensor in ordered:
            if isinstance(tensor, Computed) or not _copied_by_kernel(tensor, stream):
                for chunk in tensor.chunks():
                    _write(stream, chunk)


def _lay_out(tensors: Sequence[Tensor]) -> tuple[list[Tensor], bytes]:
    """The tensors in the order of their bytes, and what comes before these.

    Wide dtypes come first, so that every tensor is aligned to its element size: readers view the file's bytes.
    """
    ordered = sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the data begins at a multiple of 8, as the reference writer has it
    return ordered, struct.pack("<Q", len(raw)) + raw


def _copied_by_kernel(tensor: Tensor, stream: BinaryIO) -> bool:
    """Copy a tensor without its bytes passing through this process. False where that cannot be: nothing is written.

    Slice by slice; while one is copied, the one before goes to the disk and out of the page cache: a head must not push
    out what a server on this machine has there, and on virtual machines new pages cost more than the copying.
    """
    position, target = tensor.begin, stream.fileno()
    before: Future[None] | None = None
    with ThreadPoolExecutor(1) as pool, tensor.path.open("rb") as source:
        while position < tensor.end:
            try:
                copied = os.copy_file_range(source.fileno(), target, min(SLICE, tensor.end - position), position)
            except (OSError, AttributeError):  # another file system, or another system
                if position == tensor.begin:
                    return False
                raise
            if not copied:
                raise CheckpointError(f"{tensor.path.name} ends inside {tensor.name}: download the file again")
            if before is not None:
                before.result()
            if tensor.nbytes > SLICE:
                before = pool.submit(_let_go, target, source.fileno(), position, copied)
            position += copied
        if before is not None:
            before.result()
    return True


def _let_go(target: int, source: int, position: int, count: int) -> None:
    """Bring what was written to the disk, and drop it and what was read from the page cache."""
    os.fdatasync(target)
    os.posix_fadvise(target, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(source, position, count, os.POSIX_FADV_DONTNEED)


def split_into_shards(tensors: Iterable[Tensor], limit: int = MAX_SHARD) -> dict[str, list[Tensor]]:
    """Lay tensors out over `model-0000i-of-0000n.safetensors`, in order, each at most `limit` bytes of data.

    A single shard has that name too, never `model.safetensors`: loaders prefer that name to an index, and would
    miss a head that is added later in a shard of its own.
    """
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def index_of(layout: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """The index document for a layout, with the true total_size (bytes of data, headers not counted)."""
    weight_map = {t.name: shard for shard, tensors in layout.items() for t in tensors}
    total = sum(map(_nbytes, layout.values()))
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
