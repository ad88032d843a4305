"""Tests against the real vLLM: they run where its interpreter is, and are skipped where it is not.

`infra/engines/install build/vllm` makes it; REQUANT_VLLM_PYTHON names another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from infra.hub.launch import HubStandIn
from tests.factories.paths import ROOT

if TYPE_CHECKING:
    from tests.engines.pipeline import Made


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM."""
    path = Path(os.environ.get("REQUANT_VLLM_PYTHON", ROOT / "build" / "vllm" / "bin" / "python"))
    if not path.exists():
        pytest.skip(f"no vLLM: run infra/engines/install {ROOT / 'build' / 'vllm'}")
    return str(path)


@pytest.fixture(scope="session")
def made(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """The whole pipeline's result, its Hub still there."""
    from tests.engines.pipeline import run_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    with HubStandIn(folder / "hub", user="me") as hub:
        yield run_pipeline(folder, hub, vllm_python)
