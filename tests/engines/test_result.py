"""The pipeline's result in the real vLLM: it loads in both precisions, and drafts as its base does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from infra.dev.engines.prompts import PLACE_TOKENS, places
from tests.engines.pipeline import Made
from tests.factories.paths import ROOT, TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tried(vllm_python: str, well_made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Base and result in bfloat16, and the result in half."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.json"
    prompts.write_text(json.dumps(places()))
    script, draft = Path(__file__).parent / "try_all.py", ROOT / "infra" / "dev" / "engines" / "draft.py"
    models = [str(TINY), str(well_made.folder), f"{well_made.folder}:half"]
    command = [vllm_python, script, draft, prompts, str(PLACE_TOKENS), *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {n: r["with"] for n, r in zip(("base", "result", "half"), json.loads(done.stdout), strict=True)}
    for name, result in results.items():
        print(f"{name}: {result['error'] or ''} {result['accepted']} of {result['drafted']}: {result['acceptance']}")
    return results


@pytest.mark.parametrize("name", ["result", "half"])
def test_the_result_loads_without_a_word_about_skipped_weights(name: str, tried: dict[str, Any]) -> None:
    assert tried[name]["load_seconds"] is not None and tried[name]["warnings"] == []


def test_the_result_drafts_as_its_base_does(tried: dict[str, Any]) -> None:
    base, ours = tried["base"], tried["result"]
    assert base["drafted"] >= 5000 and ours["drafted"] >= 5000
    assert abs(ours["acceptance"] - base["acceptance"]) < 0.03
    assert ours["outputs"] != base["outputs"]  # it is not the base that was tried twice


def test_in_half_precision_it_stops_at_nothing_but_this_machines_kernel(tried: dict[str, Any]) -> None:
    """vLLM 0.32 for the CPU computes linear attention in BF16 only: it says so at the first token."""
    assert tried["result"]["error"] is None
    assert "CPU GDN attention requires BF16" in tried["half"]["error"]
