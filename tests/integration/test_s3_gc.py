"""On a real S3 server: gc and its clock, uploads that were cut off, the least privileges, how objects are written."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from requant.tasks.errors import StoreError
from requant.tasks.store import Store
from requant.tasks.store.catalog import read_catalog
from requant.tasks.store.copy import copy
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.gc import Policy, collect, make_plan
from requant.tasks.store.s3 import S3Backend
from requant.tasks.store.store import blob_key
from requant.tasks.store.verify import verify_store
from tests.factories.paths import ROOT
from tests.factories.requant import wait_for
from tests.factories.stores import keep

POLICY = ROOT / "infra" / "dev" / "s3" / "policy.json"


@pytest.fixture
def backend(ceph: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Backend:
    for name, value in ceph.items():
        monkeypatch.setenv(name, value)
    return S3Backend("requant", request.node.name[:40], retry_s=30)


@pytest.fixture
def store(backend: S3Backend, tmp_path: Path) -> Store:
    made = Store(backend, FolderBackend(tmp_path / "near"))
    made.check()
    return made


def client() -> Any:
    return boto3.client("s3", config=Config(s3={"addressing_style": "path"}))


def test_gc_goes_by_the_servers_clock_whatever_this_machine_says(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(store, "old", {"file": b"old"})
    monkeypatch.setattr("time.time", lambda: 4e9)  # boto3 signs with datetime, which this leaves alone
    assert collect(store, Policy(max_bytes=0)).artifacts == []
    assert [entry.key for entry in collect(store, Policy(max_bytes=0, grace_s=-2)).artifacts] == ["old"]
    assert not list(store.backend.keys("blobs")) + list(store.backend.keys("artifacts"))


def test_our_uploads_that_were_cut_off_are_ended_and_no_others(store: Store) -> None:
    prefix = store.backend.url.partition("requant/")[2]
    ours, others = f"{prefix}/{blob_key('a' * 64)}", [f"{prefix}/notes/theirs", "elsewhere/blobs/theirs"]
    for key in (ours, *others):
        upload = client().create_multipart_upload(Bucket="requant", Key=key)["UploadId"]
        client().upload_part(Bucket="requant", Key=key, UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20))
    assert collect(store, Policy()).leftovers == []  # an upload may be going on
    gone = collect(store, Policy(grace_s=-2)).leftovers
    assert len(gone) == 1 and gone[0].startswith(blob_key("a" * 64))
    left = client().list_multipart_uploads(Bucket="requant")["Uploads"]
    assert {upload["Key"] for upload in left} >= set(others) and ours not in {upload["Key"] for upload in left}


def test_what_others_put_below_the_prefix_is_passed_over(store: Store) -> None:
    prefix = store.backend.url.partition("requant/")[2]
    theirs = [
        f"{prefix}/{key}" for key in ("blobs//twice", "blobs/../up", "blobs/notes.txt", "artifacts/a/../b", "work")
    ]
    for key in theirs:
        client().put_object(Bucket="requant", Key=key, Body=b"x")
    assert read_catalog(store).entries == {}
    assert collect(store, Policy(grace_s=-2, unfinished_s=-2)).is_empty
    listed = client().list_objects_v2(Bucket="requant", Prefix=f"{prefix}/")["Contents"]
    assert {item["Key"] for item in listed} == set(theirs)


def test_the_upload_of_a_blob_that_a_lease_needs_goes_on(store: Store, tmp_path: Path) -> None:
    manifest = keep(store, "a", {"file": b"x"})
    key = blob_key(manifest["file"].sha256)
    client().create_multipart_upload(Bucket="requant", Key=store.backend.url.partition("requant/")[2] + "/" + key)
    policy = Policy(grace_s=2)
    wait_for(lambda: make_plan(store, policy).leftovers, pause=0.1)  # it is old enough to be collected
    with store.lease("download", "key"):
        store.need(manifest.files)
        assert collect(store, policy).leftovers == []
    assert len(collect(store, policy).leftovers) == 1


def test_an_artifact_moves_from_a_bucket_to_a_folder_and_back(store: Store, tmp_path: Path) -> None:
    manifest = keep(store, "a", {"file": b"weights" * 1000})
    folder = FolderBackend(tmp_path / "stick")
    stick = Store(folder, cache=folder)
    stick.check()
    copy(store, stick, read_catalog(store).entries.values())
    store.backend.delete("artifacts/quantize/a")
    collect(store, Policy(grace_s=-2))
    assert not list(store.backend.keys("blobs"))
    copy(stick, store, read_catalog(stick).entries.values())
    assert store.manifest("quantize", "a") == manifest and verify_store(store, deep=True).problems == []


def test_a_blob_altered_in_the_bucket_is_put_back_from_the_local_cache(store: Store, tmp_path: Path) -> None:
    manifest = keep(store, "a", {"file": b"right"})
    store.backend.write(blob_key(manifest["file"].sha256), b"wrong")
    assert verify_store(store).problems == [] and len(verify_store(store, deep=True).problems) == 1
    assert "was put back from" in verify_store(store, deep=True, repair=True).repairs[0]
    assert store.backend.read(blob_key(manifest["file"].sha256)) == b"right"


def test_the_policy_is_enough_for_a_store_and_reaches_nothing_else(
    store: Store, ceph: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = store.backend.url.partition("requant/")[2]
    S3Backend("requant", "private").write("secret", b"1")
    document = json.loads(POLICY.read_text().replace("BUCKET", "requant").replace("PREFIX", prefix))
    for statement in document["Statement"]:
        statement["Principal"] = {"AWS": ["arn:aws:iam:::user/least"]}
    client().put_bucket_policy(Bucket="requant", Policy=json.dumps(document))
    command = ["radosgw-admin", "-c", "ceph.conf", "user", "create", "--uid", "least", "--display-name", "least"]
    made = subprocess.run(command, cwd=ceph["CEPH_FOLDER"], check=True, capture_output=True, text=True)
    keys = json.loads(made.stdout)["keys"][0]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys["access_key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys["secret_key"])

    least = Store(S3Backend("requant", prefix, retry_s=0), FolderBackend(tmp_path / "least"))
    least.check()
    assert least.manifest("quantize", "not there") is None  # 404, and not 403
    with least.lease("quantize", "large"):
        manifest = keep(least, "large", {"file": b"x" * (70 << 20)})  # sent in parts
    assert least.find("quantize", "large") == manifest
    other = Store(least.backend, FolderBackend(tmp_path / "other"))
    other.link_files(manifest, tmp_path / "out")
    least.backend.delete("artifacts/quantize/large")
    collect(least, Policy(grace_s=-2, unfinished_s=-2))
    assert not list(least.backend.keys("blobs"))

    elsewhere = S3Backend("requant", "private", retry_s=0)
    for refused in (
        lambda: elsewhere.read("secret"),
        lambda: elsewhere.write("x", b""),
        lambda: elsewhere.delete("secret"),
        lambda: list(elsewhere.keys("a")),
        elsewhere.check,
    ):
        with pytest.raises(StoreError, match="refuses these credentials"):
            refused()


class Recorder(BaseHTTPRequestHandler):
    """Answers every PUT well, and keeps its headers."""

    seen: dict[str, dict[str, str]]
    protocol_version = "HTTP/1.1"  # answers 100 Continue, for which the client would wait a second in vain

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen[self.path] = {name.lower(): value for name, value in self.headers.items()}
        self.send_response(200)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_DELETE(self) -> None:
        """The store is not well."""
        self.seen[f"{self.path} {len(self.seen)}"] = {}
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def recorder() -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    handler = type("Handler", (Recorder,), {"seen": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.seen
    finally:
        server.shutdown()
        server.server_close()


def test_encryption_and_storage_class_are_sent_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with recorder() as (url, seen):
        for name, value in {
            "AWS_ENDPOINT_URL_S3": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "REQUANT_S3_SSE": "aws:kms",
            "REQUANT_S3_SSE_KMS_KEY_ID": "alias/store",
            "REQUANT_S3_STORAGE_CLASS": "STANDARD_IA",
        }.items():
            monkeypatch.setenv(name, value)
        backend = S3Backend("bucket", "p", retry_s=0)
        backend.write("small", b"1")
        backend.write_new("new", b"1")
        backend.put_file("blobs/large", tmp_path / "file")
    assert set(seen) == {"/bucket/p/small", "/bucket/p/new", "/bucket/p/blobs/large"}
    for path, headers in seen.items():
        assert headers["x-amz-server-side-encryption"] == "aws:kms"
        assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == "alias/store"
        assert headers.get("x-amz-storage-class") == ("STANDARD_IA" if "large" in path else None)
    assert seen["/bucket/p/new"]["if-none-match"] == "*"


def test_a_deletion_is_not_tried_again_once_the_lease_to_delete_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def assert_held() -> None:
        asked.append(time.monotonic())
        if len(asked) == 3:
            raise StoreError("the lease was not renewed in time")

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with recorder() as (url, seen):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        with pytest.raises(StoreError, match="not renewed in time"):
            S3Backend("bucket", "p", retry_s=60).delete("blobs/needed", assert_held)
    assert len(asked) == 3 and len(seen) == 2
