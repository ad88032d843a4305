"""Large files to and from S3: in one request or in parts, checked against the hash that names them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from requant.tasks.errors import CorruptBlob
from requant.tasks.store import transfer
from requant.tasks.store.s3 import S3Backend


@pytest.fixture
def s3(ceph: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Backend:
    for name, value in ceph.items():
        monkeypatch.setenv(name, value)
    return S3Backend("requant", request.node.name[:40], retry_s=10)


@pytest.fixture(params=["one request", "parts"])
def small_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """S3's smallest parts are of 5 MiB."""
    monkeypatch.setattr(transfer, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(transfer, "MAX_SINGLE_PUT_BYTES", 0 if request.param == "parts" else 1 << 30)
    yield request.param


def random_file(path: Path, size: int) -> str:
    path.write_bytes(os.urandom(size))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [1, 5 << 20, (5 << 20) + 1, 23_000_001])
def test_a_file_comes_back_as_it_was_sent(s3: S3Backend, tmp_path: Path, small_parts: str, size: int) -> None:
    sha256 = random_file(tmp_path / "file", size)
    s3.put_file("key", tmp_path / "file", sha256)
    assert s3.get_file("key", tmp_path / "back") == sha256
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()


def test_an_empty_file_comes_back(s3: S3Backend, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    s3.put_file("key", tmp_path / "file")
    assert s3.get_file("key", tmp_path / "back") == hashlib.sha256(b"").hexdigest()
    assert (tmp_path / "back").read_bytes() == b""


def test_a_file_without_a_known_hash_is_sent_too(s3: S3Backend, tmp_path: Path, small_parts: str) -> None:
    sha256 = random_file(tmp_path / "file", 6 << 20)
    s3.put_file("key", tmp_path / "file")
    assert s3.get_file("key", tmp_path / "back") == sha256


def test_a_file_that_is_not_what_its_name_says_is_refused_and_nothing_is_left(
    s3: S3Backend, tmp_path: Path, small_parts: str
) -> None:
    sha256 = random_file(tmp_path / "file", 12 << 20)
    with (tmp_path / "file").open("r+b") as stream:
        stream.seek(7 << 20)
        stream.write(b"altered on the disk")
    with pytest.raises(CorruptBlob, match=f"does not have the sha256 {sha256[:12]}"):
        s3.put_file("key", tmp_path / "file", sha256)
    assert s3.size("key") is None
    uploads = s3._client.list_multipart_uploads(Bucket="requant", Prefix=s3.prefix)
    assert not uploads.get("Uploads")


def test_a_get_of_what_is_not_there_leaves_no_file(s3: S3Backend, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="refused GetObject"):
        s3.get_file("nothing", tmp_path / "back")
    assert not (tmp_path / "back").exists()
