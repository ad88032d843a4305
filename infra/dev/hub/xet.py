"""What Xet stores: xorbs as they were uploaded, and files as ranges of chunks of xorbs.

    xorbs/<hash>           chunks, each behind a header of 8 bytes
    files/<sha256>.json    which chunks make a file, by the sha256 that a commit names

The formats are those of https://huggingface.co/docs/xet (chapters "Xorb" and "Shard") and xet-core 1.6. Hashes are not
computed: a commit takes a file only if what the chunks make has its sha256.
"""

import hashlib
import re
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import lz4.frame
from pydantic import BaseModel

from infra.dev.hub.repository import write_file

HASH = re.compile(r"[0-9a-f]{64}")
MAX_CHUNK_BYTES = 2**17
_CHUNK_HEADER_BYTES = 8
_FOOTER = b"XETBLOB"  # of a xorb; newer clients leave it out
_SHARD_TAG = b"HFRepoMetaData"
_SHARD_HEADER_BYTES, _RECORD = 48, struct.Struct("<32s4I")
_BOOKEND = b"\xff" * 32
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30


class BrokenUpload(ValueError):
    """A xorb or a shard that cannot be read, or that names what is not here."""


class Segment(BaseModel):
    """The chunks `start` to `end` (exclusive) of a xorb, which hold `size` bytes of a file."""

    xorb: str
    start: int
    end: int
    size: int


class XetFile(BaseModel):
    """A file: its hash in Xet, its sha256, and its content."""

    hash: str
    sha256: str
    segments: list[Segment]

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in its xorb, with its header, and how many bytes it holds when it is unpacked."""

    offset: int
    stored: int
    size: int


class XetStorage:
    """The xorbs and files of all repositories, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_hash: dict[str, XetFile] = {}
        self._lock = threading.Lock()
        for path in folder.glob("files/*.json"):
            file = XetFile.model_validate_json(path.read_bytes())
            self._by_hash[file.hash] = file

    def xorb_path(self, xorb: str) -> Path:
        return self._folder / "xorbs" / xorb

    def put_xorb(self, xorb: str, data: bytes) -> bool:
        """Store a xorb. Returns whether it is new. Raises BrokenUpload."""
        list(_read_chunks(memoryview(data)))
        if new := not self.xorb_path(xorb).exists():
            write_file(self.xorb_path(xorb), data)
        return new

    def put_shard(self, shard: bytes) -> bool:
        """Store the files that a shard describes. Returns whether one is new. Raises BrokenUpload."""
        files = read_shard(shard)
        for segment in (segment for file in files for segment in file.segments):
            if not self.xorb_path(segment.xorb).exists():
                raise BrokenUpload(f"xorb {segment.xorb} was not uploaded")
        new = [file for file in files if file.hash not in self._by_hash]
        for file in new:
            write_file(self._folder / "files" / f"{file.sha256}.json", file.model_dump_json().encode())
            with self._lock:
                self._by_hash[file.hash] = file
        return bool(new)

    def find(self, file_hash: str) -> XetFile | None:
        return self._by_hash.get(file_hash)

    def find_sha256(self, sha256: str) -> XetFile | None:
        path = self._folder / "files" / f"{sha256}.json"
        return XetFile.model_validate_json(path.read_bytes()) if path.exists() else None

    def chunks_of(self, segment: Segment) -> list[Chunk]:
        """Return the chunks of a segment. Raises BrokenUpload if the xorb has fewer."""
        data = memoryview(self.xorb_path(segment.xorb).read_bytes())
        chunks = list(_read_chunks(data))[segment.start : segment.end]
        if sum(chunk.size for chunk in chunks) != segment.size:
            raise BrokenUpload(f"chunks {segment.start} to {segment.end} of xorb {segment.xorb} are not as announced")
        return chunks

    def rebuild(self, file: XetFile, path: Path) -> None:
        """Write the content of a file to `path`. Raises BrokenUpload if it has another sha256."""
        digest = hashlib.sha256()
        with path.open("wb") as out:
            for segment in file.segments:
                with self.xorb_path(segment.xorb).open("rb") as xorb:
                    for chunk in self.chunks_of(segment):
                        data = _unpack(xorb, chunk)
                        digest.update(data)
                        out.write(data)
        if digest.hexdigest() != file.sha256:
            raise BrokenUpload(f"the chunks make a file with sha256 {digest.hexdigest()}, not {file.sha256}")


def _read_chunks(xorb: memoryview) -> Iterator[Chunk]:
    """Yield the chunks of a xorb. Raises BrokenUpload."""
    at = 0
    while at < len(xorb) and xorb[at : at + len(_FOOTER)] != _FOOTER:
        stored = _CHUNK_HEADER_BYTES + int.from_bytes(xorb[at + 1 : at + 4], "little")
        size = int.from_bytes(xorb[at + 5 : at + 8], "little")
        if xorb[at] != 0 or not 0 < size <= MAX_CHUNK_BYTES or at + stored > len(xorb):
            raise BrokenUpload(f"the xorb has no valid chunk at byte {at}")
        yield Chunk(at, stored, size)
        at += stored


def _unpack(xorb: BinaryIO, chunk: Chunk) -> bytes:
    xorb.seek(chunk.offset)
    stored = xorb.read(chunk.stored)
    scheme, body = stored[4], stored[_CHUNK_HEADER_BYTES:]
    try:
        data: bytes = lz4.frame.decompress(body) if scheme else body
    except RuntimeError as error:
        raise BrokenUpload(f"a chunk cannot be unpacked: {error}") from error
    return _interleave(data) if scheme == 2 else data


def _interleave(grouped: bytes) -> bytes:
    """Undo BG4: all first bytes of groups of four come first, then all second bytes, and so on."""
    data, at = bytearray(len(grouped)), 0
    for offset in range(4):
        count = len(data[offset::4])
        data[offset::4] = grouped[at : at + count]
        at += count
    return bytes(data)


def read_shard(shard: bytes) -> list[XetFile]:
    """Return the files in the first section of a shard. Raises BrokenUpload."""
    if not shard.startswith(_SHARD_TAG):
        raise BrokenUpload("this is not a shard")
    files, at = [], _SHARD_HEADER_BYTES

    def record() -> tuple[bytes, int, int, int, int]:
        nonlocal at
        if at + _RECORD.size > len(shard):
            raise BrokenUpload("the shard ends in the middle of its files")
        at += _RECORD.size
        digest, first, second, third, fourth = _RECORD.unpack_from(shard, at - _RECORD.size)
        return digest, first, second, third, fourth

    while (header := record())[0] != _BOOKEND:
        digest, flags, count, _, _ = header
        segments = []
        for _ in range(count):
            xorb, _, size, start, end = record()
            segments.append(Segment(xorb=_hex(xorb), start=start, end=end, size=size))
        for _ in range(count if flags & _WITH_VERIFICATION else 0):
            record()
        if not flags & _WITH_METADATA:
            raise BrokenUpload(f"file {_hex(digest)} has no sha256")
        files.append(XetFile(hash=_hex(digest), sha256=_hex(record()[0]), segments=segments))
    return files


def _hex(digest: bytes) -> str:
    """Return a hash as Xet writes it: as four numbers, of which the lowest byte is stored first."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
