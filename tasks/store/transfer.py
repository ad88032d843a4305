"""Large files to and from S3: both cores and the wire kept busy, bounded memory, every byte's hash checked once.

A file up to MAX_SINGLE_PUT_BYTES is one PutObject signed with the sha256 that names it: the server computes the hash
while it receives, and refuses anything else, while the client reads once and hashes nothing. A larger one is sent in
parts, each
signed with its own hash, and the whole is hashed in the same read. A file is fetched in ranges, and hashed from the
page cache behind them. What is cut goes on where it stopped: a range at its last byte, an upload at its last part.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth
from botocore.exceptions import ClientError, ResponseStreamingError

from requant.tasks.artifact import sha256_of
from requant.tasks.errors import CorruptBlob

T = TypeVar("T")

PART = (
    16 << 20
)  # measured: 8 MB costs the server more, 32 MB the client (its allocator gives such blocks back each time)
PARALLEL_PARTS = 6  # under way at once, of all uploads together, each in memory; of all downloads together
MAX_SINGLE_PUT_BYTES = 1 << 30  # the most that is sent again after a cut
CHUNK_BYTES = 256 << 10
MAX_PARTS = 10_000  # of one object, S3's limit
REFUSED_HASH = {"XAmzContentSHA256Mismatch", "BadDigest"}  # what arrived is not what was signed
SIGNER = "requant-s3v4"


class Patience(Protocol):
    """Calls again what failed in a way that passes."""

    def __call__(self, call: Callable[[], T], /) -> T: ...


class _SignedByName(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """Signs a body that knows its sha256 without reading it."""

    def payload(self, request: Any) -> Any:
        return getattr(request.body, "sha256", None) or super().payload(request)


class _Named(io.FileIO):
    """A file whose content should have this sha256."""

    def __init__(self, path: Path, sha256: str) -> None:
        super().__init__(path)
        self.sha256 = sha256

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_at_least_a_chunk(size)) or b""


class _Part(io.RawIOBase):
    """A part in memory, sent in pieces: at once, all of it would have to leave within one time-out of the socket."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, len(self._data))[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        piece = self._data[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_at_least_a_chunk(size)) or b""


def _at_least_a_chunk(size: int | None) -> int:
    """http.client asks for 16 KB at a time."""
    return max(size, CHUNK_BYTES) if size is not None and size >= 0 else -1


def sign_by_name(client: Any) -> None:
    """Let `client` put files that know their sha256 without reading them first."""
    AUTH_TYPE_MAPS[SIGNER] = _SignedByName

    def choose(signature_version: Any, **_: Any) -> str | None:
        return SIGNER if signature_version in {"s3v4", "v4"} else None

    client.meta.events.register("choose-signer.s3.PutObject", choose)


class Transfer:
    """Moves files between this machine and one bucket; any number of threads may use one."""

    def __init__(self, client: Any, bucket: str, patiently: Patience) -> None:
        self._client, self._bucket, self._patiently = client, bucket, patiently
        self._senders = ThreadPoolExecutor(PARALLEL_PARTS, "send")
        self._fetchers = ThreadPoolExecutor(PARALLEL_PARTS, "fetch")
        self._buffers: queue.LifoQueue[bytearray] = queue.LifoQueue()
        for _ in range(PARALLEL_PARTS + 1):
            self._buffers.put(bytearray())  # grows when it is used first, and is kept

    def send(self, key: str, path: Path, sha256: str | None = None, **settings: Any) -> None:
        """Upload a file. Raises CorruptBlob if it does not have this sha256.

        `settings` are those of PutObject and CreateMultipartUpload.
        """
        if path.stat().st_size > MAX_SINGLE_PUT_BYTES:
            self._send_parts(key, path, sha256, settings)
        else:
            known = sha256 or sha256_of(path)
            self._patiently(lambda: self._send_whole(key, path, known, settings))

    def _send_whole(self, key: str, path: Path, sha256: str, settings: dict[str, Any]) -> None:
        with _Named(path, sha256) as body:
            try:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=body, **settings)
            except ClientError as error:
                if error_code(error) in REFUSED_HASH and sha256_of(path) != sha256:
                    raise _changed(path, sha256) from error
                raise

    def _send_parts(self, key: str, path: Path, sha256: str | None, settings: dict[str, Any]) -> None:
        where = {"Bucket": self._bucket, "Key": key}
        begun = self._patiently(lambda: self._client.create_multipart_upload(**where, **settings))
        where["UploadId"] = begun["UploadId"]
        size = path.stat().st_size
        part = max(PART, -(-size // MAX_PARTS))
        sent: list[Future[dict[str, Any]]] = []
        whole = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as stream:
                for number in range(1, -(-size // part) + 1):
                    buffer = self._buffers.get()
                    try:
                        if len(buffer) < part:
                            buffer = bytearray(part)
                        data = memoryview(buffer)[: stream.readinto(buffer)]
                        whole.update(data)
                        sent.append(self._senders.submit(self._send_part, where, number, data))
                    except BaseException:
                        self._buffers.put(buffer)
                        raise
                    sent[-1].add_done_callback(functools.partial(self._give_back, buffer))
                    if number > 2 * PARALLEL_PARTS:
                        sent[-2 * PARALLEL_PARTS].result()  # what fails for good is known before all is read
            parts = [future.result() for future in sent]
            if sha256 is not None and whole.hexdigest() != sha256:
                raise _changed(path, sha256)
            self._patiently(lambda: self._complete(where, parts, size))
        except BaseException:
            for future in sent:
                future.cancel()
            with contextlib.suppress(Exception):  # what is left is swept by `requant store gc`
                self._client.abort_multipart_upload(**where)
            raise

    def _give_back(self, buffer: bytearray, _: Future[dict[str, Any]]) -> None:
        self._buffers.put(buffer)

    def _send_part(self, where: dict[str, str], number: int, data: memoryview) -> dict[str, Any]:
        answer = self._patiently(lambda: self._client.upload_part(**where, PartNumber=number, Body=_Part(data)))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _complete(self, where: dict[str, str], parts: list[dict[str, Any]], size: int) -> None:
        try:
            self._client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # Done before, by a request whose answer got lost or that was delivered twice.
            if error_code(error) != "NoSuchUpload":
                raise
            there = self._client.head_object(Bucket=self._bucket, Key=where["Key"])
            if there["ContentLength"] != size:
                raise

    def fetch(self, key: str, path: Path) -> str:
        """Download into a new file; the sha256 of what came. The file is on the disk when this returns."""
        first = self._patiently(lambda: self._open(key, 0, PART))
        if first is None:  # empty
            path.touch(exist_ok=False)
            return hashlib.sha256().hexdigest()
        size, etag = int(first["ContentRange"].rpartition("/")[2]), first["ETag"]
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        came: list[Future[None]] = []
        try:
            came += [
                self._fetchers.submit(self._fetch_range, key, descriptor, at, min(at + PART, size), etag)
                for at in range(PART, size, PART)
            ]
            self._fetch_range(key, descriptor, 0, min(PART, size), etag, first)
            whole, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
            for number, start in enumerate(range(0, size, PART)):
                if number:
                    came[number - 1].result()
                at, end = start, min(start + PART, size)
                while at < end:
                    read = os.preadv(descriptor, [buffer[: end - at]], at)
                    whole.update(buffer[:read])
                    at += read
                _write_back(descriptor, start, end - start)
            os.fsync(descriptor)
            return whole.hexdigest()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            for future in came:
                future.cancel()
            for future in came:
                if not future.cancelled():
                    future.exception()  # nothing may write to a descriptor that is closed
            os.close(descriptor)

    def _open(self, key: str, start: int, end: int, **condition: str) -> dict[str, Any] | None:
        """GetObject from `start` up to `end`; None if there is nothing at all."""
        try:
            answer: dict[str, Any] = self._client.get_object(
                Bucket=self._bucket, Key=key, Range=f"bytes={start}-{end - 1}", **condition
            )
        except ClientError as error:
            if start == 0 and error_code(error) == "InvalidRange":
                return None
            if error_code(error) == "PreconditionFailed":
                raise CorruptBlob(f"{key} was replaced while it was being fetched: run again") from error
            raise
        return answer

    def _fetch_range(
        self, key: str, descriptor: int, start: int, end: int, etag: str, opened: dict[str, Any] | None = None
    ) -> None:
        at = start

        def go_on() -> None:
            nonlocal at, opened
            answer, opened = opened or self._open(key, at, end, IfMatch=etag), None
            body = answer["Body"] if answer else io.BytesIO()
            with contextlib.closing(body):
                while at < end and (chunk := body.read(min(CHUNK_BYTES, end - at))):
                    at += os.pwrite(descriptor, chunk, at)
            if at < end:
                raise ResponseStreamingError(error=f"{end - at} bytes are missing")

        self._patiently(go_on)


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _changed(path: Path, sha256: str) -> CorruptBlob:
    return CorruptBlob(
        f"{path} does not have the sha256 {sha256[:12]} that it was made with: run again to make it anew"
    )


def _write_back(descriptor: int, start: int, length: int) -> None:
    """Start writing a finished range to the disk, so that the fsync at the end finds little to do."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)  # keeps what is not written yet
