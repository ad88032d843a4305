"""A store in an S3 bucket, through boto3.

Works on servers that are not AWS (Ceph, Swift, MinIO and others): path-style addressing, no checksum trailers
unless required, and PutObject with `IfNoneMatch='*'` as the only conditional write.
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
from requant.tasks.store.transfer import REFUSED_HASH, Transfer, error_code, sign_by_name

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 150.0  # seconds: a store lost in the middle of a run may come back; GPU hours are at stake
UPLOADED = ("blobs/", "resume/")  # what is sent in parts; another's upload below the same prefix is not ours to end
CONNECTION_ERRORS = (  # no answer, half of one, or one that makes no sense
    HTTPClientError, BotoConnectionError, IncompleteReadError, ResponseParserError, ConnectionError, TimeoutError,
)  # fmt: skip
TEMPORARY_CODES = {"SlowDown", "RequestTimeout", "IncompleteBody", *REFUSED_HASH}  # of the refusals
MAX_SKEW_S = 15 * 60
READ_TIMEOUT_S = 60.0  # seconds without a byte: a longer stall is a lost connection


class S3Backend:
    """Objects below `prefix` in `bucket`. The usual AWS variables apply (AWS_ENDPOINT_URL_S3 and others).

    How objects are written: s3_settings.py. Raises RecipeError for a setting that cannot be.
    `patience` is how many seconds an operation is retried while the server cannot be reached, stalls for
    `read_timeout` or answers 5xx.
    """

    def __init__(
        self, bucket: str, prefix: str = "", patience: float = PATIENCE_S, read_timeout: float = READ_TIMEOUT_S
    ) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.patience = patience
        self.read_timeout = read_timeout
        self._every, self._files = write_settings(read_settings())  # arguments of every write; of a file's beside those

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def check(self) -> None:
        try:
            once = _client(connect_timeout=4, read_timeout=10, total_max_attempts=1)
            once.list_objects_v2(Bucket=self.bucket, MaxKeys=1, Prefix=self.prefix)
        except (BotoCoreError, ClientError) as error:
            raise self._explain(error) from error
        except ValueError as error:  # an endpoint that is no URL
            raise RecipeError(f"the store {self.url} cannot be used ({error}): check AWS_ENDPOINT_URL_S3") from error

    def read(self, key: str) -> bytes | None:
        def get() -> tuple[bytes, bool]:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._name(key))
            body: bytes = answer["Body"].read()
            return body, hashlib.md5(body, usedforsecurity=False).hexdigest() in answer["ETag"]

        def get_intact() -> bytes:
            body, intact = get()
            # Not every server's ETag is an MD5: what comes twice is what is there.
            if not intact and get()[0] != body:
                raise StoreUnreachable(f"{key} from the store {self.url} arrived altered: check the network to it")
            return body

        return self._unless_missing(get_intact)

    def write(self, key: str, data: bytes) -> None:
        self._patiently(lambda: self._put(key, data))

    def write_new(self, key: str, data: bytes) -> bool:
        def put() -> bool:
            try:
                self._put(key, data, IfNoneMatch="*")
            except ClientError as error:
                # 409: another conditional write of this key is under way, and one of them wins.
                if _status(error) in {412, 409}:
                    return False
                raise
            return True

        written = self._patiently(put)
        # A retried PutObject can lose against its own first attempt whose answer got lost.
        return written or self.read(key) == data

    def size(self, key: str) -> int | None:
        return self._unless_missing(
            lambda: int(self._client.head_object(Bucket=self.bucket, Key=self._name(key))["ContentLength"])
        )

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        self._transfer.send(self._name(key), path, sha256, **self._every, **self._files)

    def get_file(self, key: str, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        return self._transfer.fetch(self._name(key), path)

    def keys(self, prefix: str) -> Iterator[str]:
        return (item.key for item in self.items(prefix))

    def items(self, prefix: str) -> Iterator[Item]:
        token: dict[str, str] = {}
        while True:
            page = self._patiently(functools.partial(self._page, f"{self.prefix}{prefix}/", token))
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(self.prefix)
                if _is_ours(key):
                    yield Item(key, item["Size"], item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def now(self) -> float:
        page = self._patiently(functools.partial(self._page, self.prefix, {}, 1))
        date: str = page["ResponseMetadata"]["HTTPHeaders"]["date"]
        return parsedate_to_datetime(date).timestamp()

    def leftovers(self, before: float) -> Iterator[str]:
        marker: dict[str, str] = {}
        while True:
            page = self._patiently(functools.partial(self._uploads, marker))
            for upload in page.get("Uploads", []):
                key = upload["Key"].removeprefix(self.prefix)
                if upload["Initiated"].timestamp() < before and key.startswith(UPLOADED) and _is_ours(key):
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
            self._once.delete_object(Bucket=self.bucket, Key=self._name(key))

        self._patiently(delete)

    def _name(self, key: str) -> str:
        """The object's full key. Names from outside stay below the prefix, also where a proxy resolves `..`."""
        check_relative(key)
        return self.prefix + key

    def _put(self, key: str, data: bytes, **condition: str) -> None:
        self._client.put_object(Bucket=self.bucket, Key=self._name(key), Body=data, **self._every, **condition)

    def _page(self, prefix: str, token: dict[str, str], most: int = 1000) -> dict[str, Any]:
        page: dict[str, Any] = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=most, **token)
        return page

    def _uploads(self, marker: dict[str, str]) -> dict[str, Any]:
        page: dict[str, Any] = self._client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix, **marker)
        return page

    @functools.cached_property
    def _client(self) -> Any:
        return _client(connect_timeout=10, read_timeout=self.read_timeout, total_max_attempts=3)

    @functools.cached_property
    def _once(self) -> Any:
        """Sends each request once and soon, or not at all: by a later one the lease to delete may be lost."""
        return _client(connect_timeout=10, read_timeout=min(self.read_timeout, 20), total_max_attempts=1)

    @functools.cached_property
    def _transfer(self) -> Transfer:
        return Transfer(self._client, self.bucket, self._patiently)

    def _unless_missing(self, call: Callable[[], T]) -> T | None:
        def unless() -> T | None:
            try:
                return call()
            except ClientError as error:
                if error_code(error) in {"404", "NoSuchKey", "NoSuchUpload", "NotFound"}:
                    return None
                raise

        return self._patiently(unless)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Retry with exponential backoff and jitter for `patience` seconds, but only failures that pass."""
        give_up = time.monotonic() + self.patience
        delay = 0.5
        while True:
            try:
                return call()
            except Exception as error:
                explained = self._explain(error)
                if not isinstance(explained, StoreUnreachable) or time.monotonic() + delay > give_up:
                    if explained is error:
                        raise
                    raise explained from error
                log.warning("%s; trying again in %.1f s", explained, delay)
                time.sleep(delay * random.uniform(0.75, 1.25))
                delay = min(delay * 2, 20.0)

    def _explain(self, error: Exception) -> Exception:
        """The sentence for a boto3 failure; the error itself where it is not about S3."""
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


def _is_ours(key: str) -> bool:
    """Whether we may have written it: what others put below the prefix, by names that we never use, is passed over."""
    try:
        check_relative(key)
    except CheckpointError:
        return False
    return True


def _client(*, connect_timeout: float, read_timeout: float, total_max_attempts: int) -> Any:
    """A boto3 S3 client; the type is Any because boto3 makes its classes at run time."""
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
    sign_by_name(client)
    return client


def _is_skewed(error: ClientError) -> bool:
    """Whether the server's clock is further from ours than S3 allows; an answer to HEAD has no body to say so."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except ValueError:
        return False
    ours: float = botocore.auth.get_current_datetime(remove_tzinfo=False).timestamp()  # the clock that we sign with
    return abs(theirs - ours) > MAX_SKEW_S


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
