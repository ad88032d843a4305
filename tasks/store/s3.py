"""A store in an S3 bucket, through boto3.

It works with servers other than AWS (Ceph, Swift, MinIO and others): it uses path-style addressing, checksum trailers
only where S3 requires them, and PutObject with `IfNoneMatch='*'` as the only conditional write.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.auth
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from requant.tasks.artifact import check_relative
from requant.tasks.errors import CheckpointError, RecipeError, StoreError, StoreUnreachable
from requant.tasks.settings import read_settings
from requant.tasks.store.backend import Item
from requant.tasks.store.s3_settings import write_settings
from requant.tasks.store.transfer import REFUSED_HASH, Transfer, error_code, sign_known_hashes

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_S = 150.0  # a failure in the middle of a run would cost GPU hours
# Prefixes of objects that are uploaded in parts. gc aborts no multipart upload of other keys, which is not Requant's.
MULTIPART_PREFIXES = ("blobs/", "resume/")
CONNECTION_ERRORS = (  # no answer, a part of one, or one that cannot be parsed
    HTTPClientError, BotoConnectionError, IncompleteReadError, ResponseParserError, ConnectionError, TimeoutError,
)  # fmt: skip
TEMPORARY_CODES = {"SlowDown", "RequestTimeout", "IncompleteBody", *REFUSED_HASH}
MAX_SKEW_S = 15 * 60
READ_TIMEOUT_S = 60.0  # between two bytes of an answer


class S3Backend:
    """Objects below `prefix` in `bucket`. The usual AWS variables apply (AWS_ENDPOINT_URL_S3 and others).

    s3_settings.py has further settings; raises RecipeError for an invalid one. An operation is retried for `retry_s`
    seconds while the server cannot be reached, answers 5xx, or sends nothing for `read_timeout_s`.
    """

    def __init__(
        self, bucket: str, prefix: str = "", retry_s: float = RETRY_S, read_timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.retry_s = retry_s
        self.read_timeout_s = read_timeout_s
        self._put_settings, self._file_settings = write_settings(read_settings())

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def check(self) -> None:
        try:
            client = _client(connect_timeout=4, read_timeout=10, total_max_attempts=1)
            client.list_objects_v2(Bucket=self.bucket, MaxKeys=1, Prefix=self.prefix)
        except (BotoCoreError, ClientError) as error:
            raise self._explain(error) from error
        except ValueError as error:  # the endpoint is not a URL
            raise RecipeError(f"the store {self.url} cannot be used ({error}): check AWS_ENDPOINT_URL_S3") from error

    def read(self, key: str) -> bytes | None:
        def get() -> tuple[bytes, bool]:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._name(key))
            body: bytes = answer["Body"].read()
            return body, hashlib.md5(body, usedforsecurity=False).hexdigest() in answer["ETag"]

        def get_intact() -> bytes:
            body, intact = get()
            # Not every server's ETag is an MD5. Where it is not, two equal answers are taken for intact.
            if not intact and get()[0] != body:
                raise StoreUnreachable(
                    f"{key} from the store {self.url} arrived altered: check the network to it", key=key
                )
            return body

        return self._unless_missing(get_intact)

    def write(self, key: str, data: bytes) -> None:
        self._retry(lambda: self._put(key, data))

    def write_new(self, key: str, data: bytes) -> bool:
        def put() -> bool:
            try:
                self._put(key, data, IfNoneMatch="*")
            except ClientError as error:
                # 409: another conditional write of this key is in progress, and one of the two succeeds.
                if _status(error) in {412, 409}:
                    return False
                raise
            return True

        written = self._retry(put)
        # The first attempt of a retried PutObject may have succeeded, and its answer was lost.
        return written or self.read(key) == data

    def size(self, key: str) -> int | None:
        return self._unless_missing(
            lambda: int(self._client.head_object(Bucket=self.bucket, Key=self._name(key))["ContentLength"])
        )

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        self._transfer.upload(self._name(key), path, sha256, **self._put_settings, **self._file_settings)

    def get_file(self, key: str, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        return self._transfer.download(self._name(key), path)

    def keys(self, prefix: str) -> Iterator[str]:
        return (item.key for item in self.items(prefix))

    def items(self, prefix: str) -> Iterator[Item]:
        token: dict[str, str] = {}
        while True:
            page = self._retry(functools.partial(self._page, f"{self.prefix}{prefix}/", token))
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(self.prefix)
                if _is_valid(key):
                    yield Item(key, item["Size"], item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def now(self) -> float:
        page = self._retry(functools.partial(self._page, self.prefix, {}, 1))
        date: str = page["ResponseMetadata"]["HTTPHeaders"]["date"]
        return parsedate_to_datetime(date).timestamp()

    def leftovers(self, before: float) -> Iterator[str]:
        marker: dict[str, str] = {}
        while True:
            page = self._retry(functools.partial(self._uploads, marker))
            for upload in page.get("Uploads", []):
                key = upload["Key"].removeprefix(self.prefix)
                if upload["Initiated"].timestamp() < before and key.startswith(MULTIPART_PREFIXES) and _is_valid(key):
                    yield f"{key}?{upload['UploadId']}"
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def discard(self, leftover: str) -> None:
        key, _, upload = leftover.rpartition("?")
        name = {"Bucket": self.bucket, "Key": self._name(key), "UploadId": upload}
        self._unless_missing(lambda: self._client.abort_multipart_upload(**name))

    def delete(self, key: str, before_try: Callable[[], None] = lambda: None) -> None:
        def delete() -> None:
            before_try()
            self._client_without_retries.delete_object(Bucket=self.bucket, Key=self._name(key))

        self._retry(delete)

    def _name(self, key: str) -> str:
        """Return the key with the prefix. Raises CheckpointError for `..`, which some proxies would resolve."""
        check_relative(key)
        return self.prefix + key

    def _put(self, key: str, data: bytes, **condition: str) -> None:
        self._client.put_object(Bucket=self.bucket, Key=self._name(key), Body=data, **self._put_settings, **condition)

    def _page(self, prefix: str, token: dict[str, str], max_keys: int = 1000) -> dict[str, Any]:
        page: dict[str, Any] = self._client.list_objects_v2(
            Bucket=self.bucket, Prefix=prefix, MaxKeys=max_keys, **token
        )
        return page

    def _uploads(self, marker: dict[str, str]) -> dict[str, Any]:
        page: dict[str, Any] = self._client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix, **marker)
        return page

    @functools.cached_property
    def _client(self) -> Any:
        return _client(connect_timeout=10, read_timeout=self.read_timeout_s, total_max_attempts=3)

    @functools.cached_property
    def _client_without_retries(self) -> Any:
        """A client that does not retry. Deleting needs a lease, which may be lost by the time of a later attempt."""
        return _client(connect_timeout=10, read_timeout=min(self.read_timeout_s, 20), total_max_attempts=1)

    @functools.cached_property
    def _transfer(self) -> Transfer:
        return Transfer(self._client, self.bucket, self._retry)

    def _unless_missing(self, call: Callable[[], T]) -> T | None:
        def unless() -> T | None:
            try:
                return call()
            except ClientError as error:
                if error_code(error) in {"404", "NoSuchKey", "NoSuchUpload", "NotFound"}:
                    return None
                raise

        return self._retry(unless)

    def _retry(self, call: Callable[[], T]) -> T:
        """Call a function. Retry temporary failures for `retry_s` seconds, with exponential backoff and jitter."""
        deadline = time.monotonic() + self.retry_s
        delay_s = 0.5
        while True:
            try:
                return call()
            except Exception as error:
                explained = self._explain(error)
                if not isinstance(explained, StoreUnreachable) or time.monotonic() + delay_s > deadline:
                    if explained is error:
                        raise
                    raise explained from error
                log.warning("%s; trying again in %.1f s", explained, delay_s)
                time.sleep(delay_s * random.uniform(0.75, 1.25))
                delay_s = min(delay_s * 2, 20.0)

    def _explain(self, error: Exception) -> Exception:
        """Return an error with a sentence for a failure of boto3, and any other error as it is."""
        if isinstance(error, StoreError):
            return error
        if isinstance(error, ClientError):
            code, status = error_code(error), _status(error)
            if code == "NoSuchBucket":
                return StoreError(f"the bucket {self.bucket!r} does not exist: create it or correct REQUANT_STORE")
            if code == "RequestTimeTooSkewed" or (status == 403 and _is_skewed(error)):
                return StoreError(f"the clocks of this machine and of the store {self.url} differ: set this machine's")
            if status in {401, 403}:
                return StoreError(
                    f"the store {self.url} refuses these credentials ({code}): check AWS_ACCESS_KEY_ID, "
                    "AWS_SECRET_ACCESS_KEY and the bucket's policy"
                )
            if status >= 500 or status in {408, 429} or code in TEMPORARY_CODES:
                return StoreUnreachable(f"the store {self.url} answers {status} {code}: try again when it is well")
            return StoreError(
                f"the store {self.url} refused {error.operation_name} ({status} {code}): check REQUANT_STORE, "
                "AWS_ENDPOINT_URL_S3 and the variables REQUANT_S3_*"
            )
        if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
            return StoreError(
                f"no AWS credentials for the store {self.url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        text = (str(error).splitlines() or [type(error).__name__])[0].partition("?")[0].replace('"', "").rstrip(":")
        if isinstance(error, CONNECTION_ERRORS):
            return StoreUnreachable(
                f"the store {self.url} cannot be reached ({text}): check AWS_ENDPOINT_URL_S3 and that the server runs"
            )
        if isinstance(error, BotoCoreError):
            return StoreError(
                f"the store {self.url} cannot be used ({text}): check REQUANT_STORE and the AWS variables"
            )
        return error


def _is_valid(key: str) -> bool:
    """Check whether Requant may have written a key. Other programs may have objects below the same prefix."""
    try:
        check_relative(key)
    except CheckpointError:
        return False
    return True


def _client(*, connect_timeout: float, read_timeout: float, total_max_attempts: int) -> Any:
    """Create an S3 client. Its type is Any because boto3 makes its classes at run time."""
    client = boto3.session.Session().client(
        "s3",
        config=Config(
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            retries={"mode": "standard", "total_max_attempts": total_max_attempts},
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=32,
        ),
    )
    sign_known_hashes(client)
    return client


def _is_skewed(error: ClientError) -> bool:
    """Check whether the server's clock differs by more than S3 allows. An answer to HEAD has no error code."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        server_time = parsedate_to_datetime(date).timestamp()
    except ValueError:
        return False
    # botocore signs requests with this clock.
    own_time: float = botocore.auth.get_current_datetime(remove_tzinfo=False).timestamp()
    return abs(server_time - own_time) > MAX_SKEW_S


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
