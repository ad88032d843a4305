"""Processes put, get, list and collect at random and are killed at random, until it was enough: `make torture`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from infra.bench.store_torture import torture

KILLS = 8
MOST_OPERATIONS = 20_000  # by which everything has happened, or never will


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Silence warnings of workers that wait for leases of killed ones."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def enough(kills: int, done: Sequence[dict[str, Any]]) -> bool:
    """Whether enough were killed in the middle, everything was done, and blobs were collected meanwhile."""
    everything = {"gc", "get", "run"} <= {each["did"] for each in done} and any(each.get("blobs") for each in done)
    return (kills >= KILLS and everything) or len(done) >= MOST_OPERATIONS


def check(result: dict[str, Any]) -> None:
    assert result["problems"] == [], result
    assert result["kills"] >= KILLS
    assert {"gc", "get", "run"} <= set(result["did"]), result
    assert result["blobs_collected"] > 0, result


def test_nothing_is_lost_in_a_folder_that_many_use_and_some_die_in(tmp_path: Path) -> None:
    check(torture((tmp_path / "store").as_uri(), tmp_path / "torture", enough, kills_a_second=1.5))


@pytest.mark.slow
def test_nothing_is_lost_in_a_bucket_that_many_use_and_some_die_in(
    ceph: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ceph.items():
        monkeypatch.setenv(name, value)
    check(torture("s3://requant/torture", tmp_path / "torture", enough))
