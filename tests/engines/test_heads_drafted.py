"""Heads behind the last layer draft in torch what they draft in the real vLLM: DeepSeek's and GLM's, tiny, float32.

On a CPU, vLLM 0.32 rotates DeepSeek's queries wrongly unless the config asks for YaRN, as DeepSeek's does; so it cannot
tell about GLM-4.7-Flash. It has no sparse attention there (DeepSeek V3.2, GLM-5).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.serving.prompts import python_prompts
from requant.tasks.validating.decode import decode, speculate
from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.model import RunSettings, Skeleton, load_tokenizer
from tests.factories.inlined import inlined_base
from tests.factories.paths import ROOT

pytestmark = pytest.mark.slow  # tests/unit/tasks/validating/test_head.py compares them with transformers' own heads
PROMPTS, TOKENS = 5, 40
DRAFTS = {"deepseek_v3": 2, "glm4_moe": 1}  # In GLM-4, vLLM makes a second draft of another hidden state.


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases whose heads draft about a third of the tokens rightly: only if all parts of a head are computed rightly."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: inlined_base(folder / kind, kind, blocks=0.2) for kind in DRAFTS}


@pytest.fixture(scope="module")
def drafted(
    vllm_python: str, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What vLLM does with each; one process for both."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.json"
    prompts.write_text(json.dumps(python_prompts(PROMPTS)))
    script, draft = Path(__file__).parent / "try_all.py", ROOT / "infra" / "dev" / "engines" / "draft.py"
    models = [f"{path}:{'twice' if DRAFTS[kind] == 2 else 'float'}" for kind, path in bases.items()]
    done = subprocess.run(
        [vllm_python, script, draft, prompts, str(TOKENS), *models], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: found["with"] for kind, found in zip(bases, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("kind", DRAFTS)
@torch.inference_mode()
def test_torch_writes_and_accepts_what_vllm_does(
    kind: str, bases: dict[str, Path], drafted: dict[str, dict[str, Any]]
) -> None:
    theirs, tokenizer = drafted[kind], load_tokenizer(bases[kind])
    assert theirs["error"] is None and theirs["warnings"] == []
    assert Judgement.of(Checkpoint.open(bases[kind])).verdicts["vllm"].mtp is True
    skeleton = Skeleton(Checkpoint.open(bases[kind]), RunSettings(torch.device("cpu"), torch.float32))
    skeleton.hold()
    head = MtpHead(skeleton.checkpoint, skeleton)
    prompts = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in python_prompts(PROMPTS)]
    plain = [decode(skeleton, prompt[None], TOKENS + DRAFTS[kind])[0] for prompt in prompts]
    pairs = zip(prompts, plain, strict=True)
    ours = [speculate(skeleton, head, prompt[None], greedy, DRAFTS[kind])[0] for prompt, greedy in pairs]
    steps, accepted = sum(one.steps for one in ours), sum(sum(one.accepted) for one in ours)
    print(
        f"{kind}: {steps} steps, {accepted} accepted; vLLM: {theirs['drafted']} drafted, {theirs['accepted']} accepted"
    )
    assert [one.tokens for one in ours] == theirs["outputs"]
    assert (steps * DRAFTS[kind], accepted) == (theirs["drafted"], theirs["accepted"])
    assert 0.2 < sum(one.accepted[0] for one in ours) / steps < 0.7
