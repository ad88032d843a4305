"""The header of one safetensors file, read and checked without touching the data.

Format: 8 bytes little-endian header length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, data.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import CheckpointError

# Bits per element: https://github.com/huggingface/safetensors, enum Dtype.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
MAX_HEADER = 100_000_000  # the reference reader's limit
COPY_CHUNK = 16 << 20


@dataclass(frozen=True)
class Tensor:
    """A tensor as bytes in a file: `[begin, end)` are absolute offsets in `path`, dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def read(self) -> bytes:
        """All bytes of the tensor, row-major, little-endian."""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """The bytes in pieces, so that memory does not follow the tensor. Raises CheckpointError if cut short."""
        with self.path.open("rb") as stream:
            stream.seek(self.begin)
            left = self.nbytes
            while left:
                chunk = stream.read(min(left, COPY_CHUNK))
                if not chunk:
                    raise CheckpointError(f"{self.path.name} ends inside {self.name}: download the file again")
                left -= len(chunk)
                yield chunk


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, in the order of their bytes.

    Raises CheckpointError, naming the file and the tensor, for anything that a reader could trip over: a length
    beyond the file, bad JSON, a name that stands twice, an unknown dtype, offsets that overlap, leave gaps or the
    file, or do not match the shape.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{path.name} is not a whole safetensors file: its header length cannot be right")
        raw = stream.read(length)
    try:
        text = raw.decode("utf-8")
        document = json.loads(text, object_pairs_hook=_no_duplicates)
        json.dumps(list(document), ensure_ascii=False).encode()  # names with lone surrogates are no text
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the header of {path.name} cannot be read ({error}): download the file again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"the header of {path.name} is not a JSON object: download the file again")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the __metadata__ of {path.name} is not text by name: download the file again")
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in document.items()]
    tensors.sort(key=lambda t: (t.begin, t.end))
    position = 8 + length
    for tensor in tensors:
        if tensor.begin != position:
            raise CheckpointError(f"{tensor.name} in {path.name} does not begin where the tensor before it ends")
        position = tensor.end
    if position != size:
        raise CheckpointError(
            f"{path.name} has {size} bytes where its header describes {position}: download the file again"
        )
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: Any, data: int) -> Tensor:
    try:
        dtype = entry["dtype"]
        bits = DTYPE_BITS[dtype]
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
        sound = type(shape) is list and all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the entry of {name[:200]!r} in {path.name} is not a tensor's ({error!r})") from error
    if not sound or _bits(shape, bits) != 8 * (end - begin):
        raise CheckpointError(f"the offsets of {name[:200]!r} in {path.name} do not match its shape and dtype")
    return Tensor(name, dtype, tuple(shape), path, data + begin, data + end)


def _bits(shape: list[int], bits: int) -> int:
    """The size of a tensor in bits, or -1 where it or any product on the way does not fit 64 bits."""
    for side in shape:
        bits *= side
        if bits >= 1 << 64:
            return -1
    return bits


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands twice")
    return document
