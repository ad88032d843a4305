"""What tests of checkpoints begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.factories.pico import pico_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of the test's own, which it may change."""
    return pico_base(tmp_path / "base")
