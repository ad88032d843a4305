"""Reads and checks the header of a safetensors file, without reading the data.

Format: 8 bytes little-endian header length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, data.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.foreign_files import beginning_of, explain_shard
from requant.tasks.checkpoint.untrusted import MAX_HEADER_BYTES, parse, shown, without_collector
from requant.tasks.errors import CheckpointError

# Bits per element: https://github.com/huggingface/safetensors, enum Dtype.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# The names of dtypes in a config, and in a header.
CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
CHUNK_BYTES = 1 << 20  # larger chunks need new memory pages each time, which costs more than it saves


@dataclass(frozen=True)
class Tensor:
    """A tensor as bytes in a file. `[begin, end)` are offsets from the start of the file `path`.

    `dtype` is in the spelling of safetensors, as BF16.
    """

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
        """Read all bytes of the tensor, row-major and little-endian."""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in chunks of at most CHUNK_BYTES. Raises CheckpointError if the file ends too early."""
        with self.path.open("rb") as stream:
            stream.seek(self.begin)
            left = self.nbytes
            while left:
                chunk = stream.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise self._ends_early()
                left -= len(chunk)
                yield chunk

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Fill a buffer with the bytes from an offset on. Raises CheckpointError if the file ends too early."""
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.begin + offset)
            while buffer:
                count = stream.readinto(buffer)
                if not count:
                    raise self._ends_early()
                buffer = buffer[count:]

    def _ends_early(self) -> CheckpointError:
        return CheckpointError(
            f"{shown(self.path.name)} ends inside {shown(self.name)}: download the file again",
            path=self.path,
            tensor=self.name,
        )


def size_of(path: Path) -> int:
    """Return the size of a regular file in bytes, or of the file that a link leads to.

    Raises FileNotFoundError if there is none, and CheckpointError for anything but a regular file: reading a pipe would
    wait for a writer, and reading a device may never end.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise
    except OSError as error:  # a cycle of links, a name that is too long, a file where a folder should be
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{shown(str(path))} is not a regular file: restore it", path=path)
    return status.st_size


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{shown(str(path))} cannot be read ({error.strerror}): restore it", path=path)


def read_header(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file, in the order of their bytes.

    Raises CheckpointError, which names file and tensor, for anything that a reader may fail on: a length beyond the
    file, invalid JSON, a repeated name, an unknown dtype, offsets that overlap, leave gaps, exceed the file or do not
    match the shape. The reference reader accepts every file that is accepted here, and some more: fields that the
    format does not have, repeated keys in the metadata, nesting and large numbers in what it ignores.
    """
    with without_collector():
        return _read(path)


def _read(path: Path) -> dict[str, Tensor]:
    file, size = shown(path.name), size_of(path)
    raw = _read_header(path, size)
    if raw is None:
        head = beginning_of(path) if size else b""
        raise CheckpointError(f"{file} {explain_shard(head)}", path=path)
    try:
        document, repeated = parse(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {file} cannot be read ({error}): download the file again", path=path
        ) from error
    if repeated:
        raise CheckpointError(
            f"the header of {file} says {shown(repeated[0])} twice: download the file again", path=path
        )
    if not isinstance(document, dict):
        raise CheckpointError(f"the header of {file} is not a JSON object: download the file again", path=path)
    metadata = document.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"the __metadata__ of {file} is not text by name: download the file again", path=path)
    data = 8 + len(raw)
    tensors = [_tensor(path, name, entry, data) for name, entry in document.items()]
    tensors.sort(key=attrgetter("begin", "end"))
    position = data
    for tensor in tensors:
        if tensor.begin != position:
            raise CheckpointError(
                f"{shown(tensor.name)} in {file} does not begin where the one before it ends: download the file again",
                path=path,
                tensor=tensor.name,
            )
        position = tensor.end
    if position != size:
        raise CheckpointError(
            f"{file} has {size} bytes where its header describes {position}: download the file again", path=path
        )
    return {tensor.name: tensor for tensor in tensors}


def _read_header(path: Path, size: int) -> bytes | None:
    """Read the bytes of the header; None if its length cannot be right.

    A file of size 0 is not opened: reading a file of the kernel may block.
    """
    if size < 10:
        return None
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                return None
            raw = stream.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    return raw if len(raw) == length else None


def _tensor(path: Path, name: str, entry: Any, data: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = DTYPE_BITS[dtype]
        numbers = (*shape, begin, end)
        known = len(entry) == 3 and type(shape) is list and {*map(type, numbers)} == {int}
    except (TypeError, KeyError, ValueError) as error:
        raise _no_tensor(path, name) from error
    if not known:
        raise _no_tensor(path, name)
    if min(numbers) < 0 or max(numbers) >= 1 << 62 or _bits(shape, bits) != 8 * (end - begin):
        raise CheckpointError(
            f"the offsets of {shown(name)} in {shown(path.name)} do not match its shape and dtype: "
            "download the file again",
            path=path,
            tensor=name,
        )
    return Tensor(name, dtype, tuple(shape), path, data + begin, data + end)


def _no_tensor(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"the entry of {shown(name)} in {shown(path.name)} is not a tensor's (a known dtype, a shape, two offsets): "
        "download the file again",
        path=path,
        tensor=name,
    )


def _bits(shape: list[int], bits: int) -> int:
    """Return the size of a tensor in bits, or -1 if any product on the way exceeds 64 bits."""
    for side in shape:
        bits *= side
        if bits >= 1 << 64:
            return -1
    return bits
