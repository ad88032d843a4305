"""Tests against the real vLLM: they run where its interpreter is, and are skipped where it is not.

`infra/engines/install build/vllm` makes it; REQUANT_VLLM_PYTHON names another one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM."""
    path = Path(os.environ.get("REQUANT_VLLM_PYTHON", ROOT / "build" / "vllm" / "bin" / "python"))
    if not path.exists():
        pytest.skip(f"no vLLM: run infra/engines/install {ROOT / 'build' / 'vllm'}")
    return str(path)
