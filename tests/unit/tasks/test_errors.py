"""Errors: parents, retryability, attributes, sentences for the operating system's errors, redaction."""

from __future__ import annotations

import errno
import inspect
import json
import pickle
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from requant.tasks import errors
from requant.tasks.artifact import File
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.header import read_header
from requant.tasks.errors import (
    SECRET_VARIABLES,
    CheckpointError,
    Collected,
    CorruptBlob,
    DiskFull,
    HubError,
    HubUnavailable,
    QuantizeDied,
    RecipeError,
    RenderingTimeout,
    RequantError,
    StoreError,
    TooFewTokens,
    WrongToolVersion,
    explain_os_error,
    redact,
)
from requant.tasks.hub.client import hub_errors
from requant.tasks.recipe.loader import load_recipe
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.store import Store, blob_key

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, RequantError)]


@pytest.mark.parametrize("error", [c for c in CLASSES if c.__name__ != "RequantError"])
def test_every_error_has_a_parent_of_the_standard_library(error: type[RequantError]) -> None:
    assert {b for b in error.__mro__ if b.__module__ == "builtins"} - {object, BaseException, Exception}


def test_only_what_passes_by_itself_is_retried() -> None:
    assert {c for c in CLASSES if c.retryable} == {Collected, HubUnavailable, QuantizeDied, RenderingTimeout}


@pytest.mark.parametrize("error", CLASSES)
def test_the_message_of_an_error_is_its_sentence(error: type[RequantError]) -> None:
    assert str(error("a sentence")) == "a sentence"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_explained_with_the_place_and_the_remedy(number: int) -> None:
    explained = explain_os_error(OSError(number, "No space left on device", "/scratch/x"))
    assert isinstance(explained, DiskFull)
    assert "/scratch/x" in str(explained) and "REQUANT_STORE" in str(explained) and "\n" not in str(explained)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_without_access_is_explained_with_its_name(number: int) -> None:
    explained = explain_os_error(OSError(number, "Permission denied"), "/store")
    assert type(explained) is StoreError
    assert str(explained).startswith("/store cannot be used (Permission denied)")


def test_a_folder_where_a_file_goes_is_named() -> None:
    in_the_way = OSError(errno.EISDIR, "Is a directory", "/out/.config.json.part", None, "/out/config.json")
    assert str(explain_os_error(in_the_way)).startswith("/out/config.json is in the way (Is a directory)")


def test_an_operating_system_error_that_users_do_not_meet_is_not_explained() -> None:
    assert explain_os_error(OSError(errno.EBADF, "Bad file descriptor")) is None


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRET_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SECRET_VARIABLES)
def test_a_secret_is_replaced_by_its_name_everywhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hf_S3cr3t/+=")
    assert redact("a hf_S3cr3t/+= b hf_S3cr3t/+=c") == f"a <{name}> b <{name}>c"


def test_an_empty_or_absent_secret_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    assert redact("nothing to hide") == "nothing to hide"


def test_a_secret_that_begins_with_another_one_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "minio")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "minio-secret")
    assert "-secret" not in redact("credentials minio:minio-secret")


def test_an_error_says_what_it_concerns_and_nothing_where_it_concerns_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as of_recipe:
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(CheckpointError) as of_folder:
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(HubError) as of_repo, hub_errors("a/b"):
        raise OfflineModeIsEnabled("switched off")
    assert of_recipe.value.path == tmp_path / "none.yaml"
    assert (of_folder.value.path, of_folder.value.tensor) == (tmp_path / "none", None)
    assert of_repo.value.repo_id == "a/b"
    assert StoreError("the bucket does not exist").key is None


def test_a_damaged_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    header = json.dumps({"layer.weight": {"dtype": "none", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert (caught.value.path, caught.value.tensor) == (path, "layer.weight")


def test_a_blob_that_is_lost_is_named_by_its_key(tmp_path: Path) -> None:
    folder = FolderBackend(tmp_path / "store")
    with pytest.raises(StoreError) as caught:
        Store(folder, cache=folder).read_blob(File("a", 1, "0" * 64))
    assert caught.value.key == blob_key("0" * 64)


@pytest.mark.parametrize(
    "error",
    [
        HubUnavailable("cut", repo_id="a/b"),
        CorruptBlob("altered", key="blobs/x"),
        TooFewTokens("short", path=Path("a"), tensor="t"),
        WrongToolVersion("other", stage="quantize"),
    ],
)
def test_an_error_passes_between_processes_with_all_that_it_says(error: RequantError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
