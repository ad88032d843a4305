"""Writes checkpoint files: streamed, hashed on the way, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.artifact import File
from tasks.checkpoint.header import DTYPE_BITS, Tensor

MAX_SHARD = 5_000_000_000  # bytes, as transformers splits


def write_file(root: Path, path: str, pieces: Iterable[bytes]) -> File:
    """Write `root/path` under a temporary name, sync, rename; on an exception nothing of it is left."""
    target = root / path
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    hasher, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
                hasher.update(piece)
                size += len(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return File(path, size, hasher.hexdigest())


def write_json(root: Path, path: str, document: Any) -> File:
    """Write JSON the way the Hub's repos have it: two spaces, a newline at the end, order kept."""
    return write_file(root, path, [(json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()])


def write_shard(root: Path, path: str, tensors: Sequence[Tensor]) -> File:
    """Write one safetensors file from tensors that lie in other files. Memory stays at one chunk.

    Wide dtypes come first, so that every tensor is aligned to its element size: readers view the file's bytes.
    """
    tensors = sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the data begins at a multiple of 8, as the reference writer has it

    def pieces() -> Iterable[bytes]:
        yield struct.pack("<Q", len(raw)) + raw
        for tensor in tensors:
            yield from tensor.chunks()

    return write_file(root, path, pieces())


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
    total = sum(t.nbytes for tensors in layout.values() for t in tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
