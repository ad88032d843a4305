"""Errors: parents, retryability, sentences for the operating system's errors, redaction."""

from __future__ import annotations

import errno
import inspect

import pytest

from requant.tasks import errors
from requant.tasks.errors import (
    SECRET_VARIABLES,
    Collected,
    DiskFull,
    HubUnavailable,
    QuantizeDied,
    RenderingTimeout,
    RequantError,
    StoreError,
    explain_os_error,
    redact,
)

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
