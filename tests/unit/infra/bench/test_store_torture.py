"""The torture ends where nothing would end it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from infra.bench import store_torture


def test_processes_that_all_stand_still_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_torture, "work", lambda *_: signal.pause())
    monkeypatch.setattr(store_torture, "STANDSTILL_S", 0.5)
    with pytest.raises(TimeoutError, match="no process has done anything in the store at file:"):
        store_torture.torture(
            (tmp_path / "store").as_uri(), tmp_path / "torture", lambda *_: False, kills_a_second=20.0
        )
