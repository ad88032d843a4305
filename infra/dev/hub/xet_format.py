"""What hf_xet 1.8 uploads: xorbs, which hold the chunks of files, and shards, which say of which chunks a file is.

Source: the specification at https://huggingface.co/docs/xet (xorb and shard formats). All integers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import lz4.frame

SHARD_HEADER_BYTES = 48
RECORD = struct.Struct("<32sIIQ")  # of a file: hash, flags, number of segments, unused
SEGMENT = struct.Struct("<32sIIII")  # xorb, flags, unpacked bytes, first chunk, chunk behind the last one
RECORD_BYTES = 48
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
END_OF_SECTION = b"\xff" * 32
CHUNK_HEADER_BYTES = 8
FOOTER = b"XETBLOB"
PLAIN, LZ4, GROUPED_LZ4 = 0, 1, 2


class MalformedUpload(ValueError):
    """A xorb or shard that does not follow the specification."""


@dataclass(frozen=True)
class Segment:
    """A range of chunks of a xorb, and the bytes that they unpack to."""

    xorb: str
    size: int
    begin: int
    end: int


@dataclass(frozen=True)
class XetFile:
    """A file of a shard: the sha256 of its content, and the segments that it is joined of."""

    sha256: str
    segments: tuple[Segment, ...]


def hex_of(raw: bytes) -> str:
    """Return a hash as it stands in addresses: four integers of eight bytes, each with its highest digit first."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def files_of(shard: bytes) -> Iterator[XetFile]:
    """Yield the files of a shard. Raises MalformedUpload."""
    at = SHARD_HEADER_BYTES
    try:
        while True:
            name, flags, count, _ = RECORD.unpack_from(shard, at)
            if name == END_OF_SECTION:
                return
            at += RECORD_BYTES
            segments = []
            for _ in range(count):
                xorb, _, size, begin, end = SEGMENT.unpack_from(shard, at)
                segments.append(Segment(hex_of(xorb), size, begin, end))
                at += RECORD_BYTES
            if flags & WITH_VERIFICATION:
                at += count * RECORD_BYTES
            if not flags & WITH_METADATA:
                raise MalformedUpload("a file of the shard has no sha256")
            yield XetFile(hex_of(shard[at : at + 32]), tuple(segments))
            at += RECORD_BYTES
    except struct.error as error:
        raise MalformedUpload(f"the shard ends too early ({error})") from error


def chunks_of(xorb: bytes) -> Iterator[bytes]:
    """Yield the chunks of a xorb, unpacked. Raises MalformedUpload."""
    at = 0
    while at < len(xorb) and not xorb.startswith(FOOTER, at):
        packed_bytes = int.from_bytes(xorb[at + 1 : at + 4], "little")
        scheme = xorb[at + 4]
        size = int.from_bytes(xorb[at + 5 : at + 8], "little")
        at += CHUNK_HEADER_BYTES
        chunk = _unpack(scheme, xorb[at : at + packed_bytes])
        if len(chunk) != size:
            raise MalformedUpload(f"a chunk has {len(chunk)} bytes, not {size}")
        yield chunk
        at += packed_bytes


def _unpack(scheme: int, packed: bytes) -> bytes:
    if scheme == PLAIN:
        return packed
    if scheme not in (LZ4, GROUPED_LZ4):
        raise MalformedUpload(f"a chunk is packed by the scheme {scheme}")
    unpacked: bytes = lz4.frame.decompress(packed)
    return unpacked if scheme == LZ4 else _interleave(unpacked)


def _interleave(grouped: bytes) -> bytes:
    """Undo the grouping of bytes: first those at the places 0, 4, 8, ..., then those at 1, 5, 9, ..., and so on."""
    joined = bytearray(len(grouped))
    at = 0
    for place in range(4):
        count = (len(grouped) - place + 3) // 4
        joined[place::4] = grouped[at : at + count]
        at += count
    return bytes(joined)
