"""Processes put, get, list and collect at random and are killed at random: `make torture`, ten seconds each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from infra.bench.store_torture import torture


def check(result: dict[str, Any]) -> None:
    assert result["problems"] == [], result
    assert result["kills"] >= 8
    assert {"gc", "get", "run"} <= set(result["did"]), result


def test_nothing_is_lost_in_a_folder_that_many_use_and_some_die_in(tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    try:
        check(torture((tmp_path / "store").as_uri(), tmp_path / "torture", 10))
    finally:
        logging.disable(logging.NOTSET)


def test_nothing_is_lost_in_a_bucket_that_many_use_and_some_die_in(
    ceph: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ceph.items():
        monkeypatch.setenv(name, value)
    logging.disable(logging.WARNING)
    try:
        check(torture("s3://requant/torture", tmp_path / "torture", 10))
    finally:
        logging.disable(logging.NOTSET)
