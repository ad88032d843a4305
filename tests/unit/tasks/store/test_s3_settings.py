"""How objects are written to S3, and the bucket policy that is enough for it."""

from __future__ import annotations

import ast
import json

import boto3
import pytest

from requant.tasks.errors import RecipeError, RequantError
from requant.tasks.settings import Settings, read_settings
from requant.tasks.store import open_store
from requant.tasks.store.s3_settings import write_settings
from tests.factories.paths import ROOT

# What boto3's calls need. Source: AWS Service Authorization Reference, actions of Amazon S3.
ACTIONS = {
    "list_objects_v2": {"s3:ListBucket"},
    "head_object": {"s3:GetObject"},
    "get_object": {"s3:GetObject"},
    "download_file": {"s3:GetObject"},
    "put_object": {"s3:PutObject"},
    "upload_file": {"s3:PutObject", "s3:AbortMultipartUpload"},
    "create_multipart_upload": {"s3:PutObject"},
    "upload_part": {"s3:PutObject"},
    "complete_multipart_upload": {"s3:PutObject"},
    "delete_object": {"s3:DeleteObject"},
    "list_multipart_uploads": {"s3:ListBucketMultipartUploads"},
    "abort_multipart_upload": {"s3:AbortMultipartUpload"},
}


def test_without_variables_the_bucket_decides() -> None:
    assert write_settings(Settings()) == ({}, {})


def test_encryption_is_for_every_object_and_the_storage_class_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "REQUANT_S3_SSE": "aws:kms",
        "REQUANT_S3_SSE_KMS_KEY_ID": "arn:aws:kms:eu-central-1:111122223333:key/1234-ab",
        "REQUANT_S3_STORAGE_CLASS": "STANDARD_IA",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    every, files = write_settings(read_settings())
    assert every == {
        "ServerSideEncryption": "aws:kms",
        "SSEKMSKeyId": "arn:aws:kms:eu-central-1:111122223333:key/1234-ab",
    }
    assert files == {"StorageClass": "STANDARD_IA"}


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"REQUANT_S3_SSE": "aes"}, "REQUANT_S3_SSE='aes' is not known: use one of AES256"),
        ({"REQUANT_S3_SSE_KMS_KEY_ID": "k"}, "set REQUANT_S3_SSE=aws:kms too"),
        ({"REQUANT_S3_SSE": "AES256", "REQUANT_S3_SSE_KMS_KEY_ID": "k"}, "set REQUANT_S3_SSE=aws:kms too"),
        ({"REQUANT_S3_SSE": "aws:kms", "REQUANT_S3_SSE_KMS_KEY_ID": "a\r\nx-amz-acl: public"}, "is no KMS key"),
        ({"REQUANT_S3_STORAGE_CLASS": "DEEP_ARCHIVE"}, "cannot be read at once"),
        ({"REQUANT_S3_STORAGE_CLASS": "standard"}, "use one of STANDARD, "),
    ],
)
def test_a_wrong_setting_is_found_when_the_store_is_opened(
    environment: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError) as caught:
        open_store("s3://bucket/prefix")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL_S3", "nonsense"),
        ("AWS_ENDPOINT_URL_S3", "http://"),
        ("AWS_DEFAULT_REGION", "no region"),
        ("AWS_PROFILE", "nobody"),
    ],
)
def test_what_boto3_itself_refuses_is_a_sentence(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv(name, value)
    with pytest.raises(RequantError, match="the store s3://bucket/prefix cannot be used") as caught:
        open_store("s3://bucket/prefix").backend.check()
    assert len(str(caught.value).splitlines()) == 1


def test_the_policy_allows_what_the_code_calls_and_nothing_else() -> None:
    policy = json.loads((ROOT / "infra" / "dev" / "s3" / "policy.json").read_text())
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    assert {statement["Effect"] for statement in policy["Statement"]} == {"Allow"}
    calls = called()
    assert {"list_objects_v2", "put_object", "delete_object"} <= calls
    assert allowed == set().union(*(ACTIONS[call] for call in calls))


def test_the_policy_reaches_no_further_than_the_prefix() -> None:
    policy = json.loads((ROOT / "infra" / "dev" / "s3" / "policy.json").read_text())
    for statement in policy["Statement"]:
        on_objects = not any("List" in action for action in statement["Action"])
        assert statement["Resource"] == ("arn:aws:s3:::BUCKET/PREFIX/*" if on_objects else "arn:aws:s3:::BUCKET")
        if statement["Action"] == ["s3:ListBucket"]:
            assert statement["Condition"] == {"StringLikeIfExists": {"s3:prefix": ["PREFIX/*"]}}


def called() -> set[str]:
    """The S3 operations that the store's code calls: methods of a boto3 client, by their names."""
    client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    operations = {name for name in dir(client) if not name.startswith("_")} - {"exceptions", "meta", "close"}
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tasks" / "store").glob("*.py")]
    attributes = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes & operations
