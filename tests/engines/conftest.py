"""Tests against the real vLLM: they run where its interpreter is, and are skipped where it is not.

`infra/dev/engines/install build/vllm` makes it; REQUANT_VLLM_PYTHON names another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.dev.hub.launch import HubStandIn
from tests.engines.pipeline import Made, run_pipeline
from tests.factories.paths import ROOT


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM."""
    path = Path(os.environ.get("REQUANT_VLLM_PYTHON", ROOT / "build" / "vllm" / "bin" / "python"))
    if not path.exists():
        pytest.skip(f"no vLLM: run infra/dev/engines/install {ROOT / 'build' / 'vllm'}")
    return str(path)


@pytest.fixture(scope="session")
def made(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A result of the whole pipeline, its Hub still there: tuned as little as passes its gates, not measured."""
    with HubStandIn(tmp_path_factory.mktemp("hub") / "hub", user="me") as hub:
        folder = tmp_path_factory.mktemp("pipeline")
        tuning = {"iters": 10, "nsamples": 32}
        yield run_pipeline(folder, hub, vllm_python, quantize=tuning, benchmark={"engine": "none"})


@pytest.fixture(scope="session")
def well_made(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Tuned as by default, so that its drafts compare with the base's, and measured with its engine."""
    with HubStandIn(tmp_path_factory.mktemp("hub") / "hub", user="me") as hub:
        yield run_pipeline(tmp_path_factory.mktemp("pipeline"), hub, vllm_python)
