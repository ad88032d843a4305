"""A file of a repo on the Hub, read where it is: what is not read is not sent."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.hub.sparse_checkout import stream

BLOCK_BYTES = 1 << 20  # how much a request asks for at least, unless the file ends before


class RemoteFile(io.RawIOBase):
    """A file of a commit, as a stream that can seek. Reading raises HubError, HubUnavailable."""

    def __init__(self, revision: Revision, file: HubFile) -> None:
        self._revision, self._file = revision, file
        self._position = 0
        self._block, self._block_begin = b"", 0
        self.bytes_read = 0

    def open(self) -> BinaryIO:
        """Return this stream with a buffer, as readers take it."""
        return cast(BinaryIO, io.BufferedReader(self))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer from the block that was read last, or from a new one that begins here."""
        at = self._position - self._block_begin
        if not 0 <= at < len(self._block):
            self._read_block(len(buffer))
            at = 0
        found = self._block[at : at + len(buffer)]
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _read_block(self, wanted_bytes: int) -> None:
        end = min(self._position + max(wanted_bytes, BLOCK_BYTES), self._file.size)
        chunks = stream(self._revision, self._file.path, self._position, end) if self._position < end else ()
        self._block, self._block_begin = b"".join(chunks), self._position
        self.bytes_read += len(self._block)
