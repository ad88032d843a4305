"""Transfer of large files to and from S3, with parallel requests, bounded memory, and one check of every byte.

- A file of up to MAX_SINGLE_PUT_BYTES is one PutObject, signed with the sha256 that the caller knows. The server hashes
  what it receives and refuses other content, so that the client reads the file once and does not hash it.
- A larger file is sent in parts. Each part is signed with its own hash, and the sha256 of the file is computed from the
  same read.
- A file is downloaded in ranges, and hashed from the page cache behind them.
- A range that is cut off continues after its last byte, and an upload after its last part.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypedDict, TypeVar

from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth
from botocore.exceptions import ClientError, ResponseStreamingError

from requant.tasks.artifact import sha256_of, write_back
from requant.tasks.errors import CorruptBlob

T = TypeVar("T")

# Measured: parts of 8 MB cost the server more time, and parts of 32 MB the client, whose allocator returns such blocks.
PART_BYTES = 16 << 20
PARALLEL_PARTS = 6  # of all uploads together, each in memory, and of all downloads together
MAX_SINGLE_PUT_BYTES = 1 << 30  # after a lost connection, a PutObject is sent again from its beginning
CHUNK_BYTES = 256 << 10
MAX_PARTS = 10_000  # S3's limit for one object
REFUSED_HASH = {"XAmzContentSHA256Mismatch", "BadDigest"}  # error codes for content without the signed hash
SIGNER = "requant-s3v4"


class Retry(Protocol):
    """A function that calls its argument again after temporary failures."""

    def __call__(self, call: Callable[[], T], /) -> T: ...


class SentPart(TypedDict):
    """A part of a multipart upload, as CompleteMultipartUpload lists it."""

    PartNumber: int
    ETag: str


class UploadId(TypedDict):
    """The arguments that name a multipart upload in every request."""

    Bucket: str
    Key: str
    UploadId: str


@dataclass(frozen=True)
class _Range:
    """The answer to a GetObject with a range: size and ETag of the whole object, and a stream of the range."""

    object_bytes: int
    etag: str
    body: BinaryIO


class _KnownHashSigner(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """A signer that does not read a body with a known sha256."""

    def payload(self, request: Any) -> Any:
        return getattr(request.body, "sha256", None) or super().payload(request)


class _HashedFile(io.FileIO):
    """A file with a known sha256."""

    def __init__(self, path: Path, sha256: str) -> None:
        super().__init__(path)
        self.sha256 = sha256

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_at_least_a_chunk(size)) or b""


class _Part(io.RawIOBase):
    """A part in memory that is read in chunks. A single write would have to end within one time-out of the socket."""

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
    """Return a size of at least CHUNK_BYTES: http.client reads bodies in pieces of 16 KB."""
    return max(size, CHUNK_BYTES) if size is not None and size >= 0 else -1


def sign_known_hashes(client: Any) -> None:
    """Let a boto3 client send files with a known sha256 without hashing them first."""
    AUTH_TYPE_MAPS[SIGNER] = _KnownHashSigner

    def choose(signature_version: Any, **_: Any) -> str | None:
        return SIGNER if signature_version in {"s3v4", "v4"} else None

    client.meta.events.register("choose-signer.s3.PutObject", choose)


class Transfer:
    """Upload and download of files of one bucket. Threads may share an instance."""

    def __init__(self, client: Any, bucket: str, retry: Retry) -> None:
        self._client, self._bucket, self._retry = client, bucket, retry
        self._uploaders = ThreadPoolExecutor(PARALLEL_PARTS, "upload")
        self._downloaders = ThreadPoolExecutor(PARALLEL_PARTS, "download")
        self._buffers: queue.LifoQueue[bytearray] = queue.LifoQueue()
        for _ in range(PARALLEL_PARTS + 1):
            self._buffers.put(bytearray())  # gets its size when it is first used, and is reused

    def upload(self, key: str, path: Path, sha256: str | None = None, **settings: str) -> None:
        """Upload a file. Raises CorruptBlob if it does not have this sha256.

        `settings` are arguments of PutObject and CreateMultipartUpload.
        """
        if path.stat().st_size > MAX_SINGLE_PUT_BYTES:
            self._upload_parts(key, path, sha256, settings)
        else:
            known = sha256 or sha256_of(path)
            self._retry(lambda: self._put(key, path, known, settings))

    def _put(self, key: str, path: Path, sha256: str, settings: Mapping[str, str]) -> None:
        with _HashedFile(path, sha256) as body:
            try:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=body, **settings)
            except ClientError as error:
                if error_code(error) in REFUSED_HASH and sha256_of(path) != sha256:
                    raise _changed(path, sha256) from error
                raise

    def _upload_parts(self, key: str, path: Path, sha256: str | None, settings: Mapping[str, str]) -> None:
        name = {"Bucket": self._bucket, "Key": key}
        created = self._retry(lambda: self._client.create_multipart_upload(**name, **settings))
        upload: UploadId = {"Bucket": self._bucket, "Key": key, "UploadId": created["UploadId"]}
        size = path.stat().st_size
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        sent: list[Future[SentPart]] = []
        hasher = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as stream:
                for number in range(1, -(-size // part_bytes) + 1):
                    buffer = self._buffers.get()
                    try:
                        if len(buffer) < part_bytes:
                            buffer = bytearray(part_bytes)
                        data = memoryview(buffer)[: stream.readinto(buffer)]
                        hasher.update(data)
                        sent.append(self._uploaders.submit(self._upload_part, upload, number, data))
                    except BaseException:
                        self._buffers.put(buffer)
                        raise
                    sent[-1].add_done_callback(functools.partial(self._return_buffer, buffer))
                    if number > 2 * PARALLEL_PARTS:
                        sent[-2 * PARALLEL_PARTS].result()  # raises a permanent failure before all parts are read
            parts = [future.result() for future in sent]
            if sha256 is not None and hasher.hexdigest() != sha256:
                raise _changed(path, sha256)
            self._retry(lambda: self._complete(upload, parts, size))
        except BaseException:
            for future in sent:
                future.cancel()
            with contextlib.suppress(Exception):  # `requant store gc` aborts uploads that are left
                self._client.abort_multipart_upload(**upload)
            raise

    def _return_buffer(self, buffer: bytearray, _: Future[SentPart]) -> None:
        self._buffers.put(buffer)

    def _upload_part(self, upload: UploadId, number: int, data: memoryview) -> SentPart:
        answer = self._retry(lambda: self._client.upload_part(**upload, PartNumber=number, Body=_Part(data)))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _complete(self, upload: UploadId, parts: list[SentPart], size: int) -> None:
        try:
            self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # An earlier request may have completed the upload, and its answer was lost.
            if error_code(error) != "NoSuchUpload":
                raise
            existing = self._client.head_object(Bucket=self._bucket, Key=upload["Key"])
            if existing["ContentLength"] != size:
                raise

    def download(self, key: str, path: Path) -> str:
        """Download an object into a new file, and return the sha256 of its content. The file is synced."""
        first = self._retry(lambda: self._open(key, 0, PART_BYTES))
        if first is None:
            path.touch(exist_ok=False)
            return hashlib.sha256().hexdigest()
        size, etag = first.object_bytes, first.etag
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        ranges: list[Future[None]] = []
        try:
            ranges += [
                self._downloaders.submit(self._download_range, key, descriptor, at, min(at + PART_BYTES, size), etag)
                for at in range(PART_BYTES, size, PART_BYTES)
            ]
            self._download_range(key, descriptor, 0, min(PART_BYTES, size), etag, first)
            hasher, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
            for number, start in enumerate(range(0, size, PART_BYTES)):
                if number:
                    ranges[number - 1].result()
                at, end = start, min(start + PART_BYTES, size)
                while at < end:
                    read_bytes = os.preadv(descriptor, [buffer[: end - at]], at)
                    hasher.update(buffer[:read_bytes])
                    at += read_bytes
                write_back(descriptor, start, end - start)
            os.fsync(descriptor)
            return hasher.hexdigest()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            for future in ranges:
                future.cancel()
            for future in ranges:
                if not future.cancelled():
                    future.exception()  # waits for the thread, which must not write to a closed descriptor
            os.close(descriptor)

    def _open(self, key: str, start: int, end: int, **condition: str) -> _Range | None:
        """Request the bytes `[start, end)` of an object. Return None for an empty object."""
        try:
            answer = self._client.get_object(
                Bucket=self._bucket, Key=key, Range=f"bytes={start}-{end - 1}", **condition
            )
        except ClientError as error:
            if start == 0 and error_code(error) == "InvalidRange":
                return None
            if error_code(error) == "PreconditionFailed":
                raise CorruptBlob(f"{key} was replaced while it was being fetched: run again", key=key) from error
            raise
        return _Range(int(answer["ContentRange"].rpartition("/")[2]), answer["ETag"], answer["Body"])

    def _download_range(
        self, key: str, descriptor: int, start: int, end: int, etag: str, opened: _Range | None = None
    ) -> None:
        at = start

        def read_rest() -> None:
            nonlocal at, opened
            answer, opened = opened or self._open(key, at, end, IfMatch=etag), None
            body = answer.body if answer else io.BytesIO()
            with contextlib.closing(body):
                while at < end and (chunk := body.read(min(CHUNK_BYTES, end - at))):
                    at += os.pwrite(descriptor, chunk, at)
            if at < end:
                raise ResponseStreamingError(error=f"{end - at} bytes are missing")

        self._retry(read_rest)


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _changed(path: Path, sha256: str) -> CorruptBlob:
    return CorruptBlob(
        f"{path} does not have the sha256 {sha256[:12]} that it was made with: run again to make it anew"
    )
