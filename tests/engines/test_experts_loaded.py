"""The real vLLM reads fused experts and single ones as the same model, and a result that has both: its head's fused.

On a CPU vLLM 0.32 has no packed experts ("CPU does not support quantized MoE yet"), so these stay at 16 bits here.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.serving.prompts import python_prompts
from tests.factories.checkpoints import write_quantized
from tests.factories.moe_bases import trained_moe, with_experts_apart
from tests.factories.paths import ROOT

PROMPTS, TOKENS = 12, 96


@pytest.mark.slow
def test_a_moe_drafts_from_fused_and_single_experts_alike_and_packed_besides(vllm_python: str, tmp_path: Path) -> None:
    base = trained_moe(tmp_path / "base")
    apart = with_experts_apart(base, tmp_path / "apart")
    made = write_quantized(base, tmp_path / "quantized", kept="mlp.experts")
    assert Judgement.of(Checkpoint.open(made)).verdicts["vllm"].mtp is True
    (tmp_path / "prompts").write_text(json.dumps(python_prompts(PROMPTS)))
    script, draft = Path(__file__).parent / "try_all.py", ROOT / "infra" / "dev" / "engines" / "draft.py"
    command = [vllm_python, script, draft, tmp_path / "prompts", str(TOKENS), base, apart, made]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    fused, single, packed = (found["with"] for found in json.loads(done.stdout))
    for result in (fused, single, packed):
        print({key: result[key] for key in ("error", "warnings", "drafted", "acceptance")})
        assert result["error"] is None and result["warnings"] == [] and result["acceptance"] > 0.75
    assert fused["outputs"] == single["outputs"] and fused["accepted"] == single["accepted"]
