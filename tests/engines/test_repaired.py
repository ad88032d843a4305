"""What people publish is diagnosed rightly, and after `mtp-fix` drafts in the real vLLM as with the base's head.

More than 5,000 drafts each, for the night; test_verdicts.py has one such checkpoint with fewer.
"""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.dev.engines.prompts import COUNT, TOKENS
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.checkpoint.repair import RepairSource, repair
from requant.tasks.serving.prompts import python_prompts
from tests.engines.variants import VARIANTS, make
from tests.factories.checkpoints import all_tensors, from_bf16, rounded, to_bf16
from tests.factories.paths import ROOT, TINY

pytestmark = pytest.mark.slow
CARD = "dequantized by the card's script"
VANILLA, PACKED_FC, SOUND = "as auto-round leaves it", "fc packed, config silent", "head as in the base"


def wrong_fc(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """The reference card's script: it subtracts the stored zero point, which is the true one minus one."""
    _, shape, data = all_tensors(TINY)["mtp.fc.weight"]
    parts, meant = rounded(from_bf16(data, shape))
    scales = np.frombuffer(parts["scales"][2], "<f2").reshape(parts["scales"][1]).T.astype(np.float32)
    tensors["mtp.fc.weight"] = ("BF16", shape, to_bf16(meant + np.repeat(scales, 32, axis=1)))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The variants of notes on real publications, each as it was found and a copy to be mended."""
    root = tmp_path_factory.mktemp("published")
    how = {name: VARIANTS[name] for name in (SOUND, VANILLA, PACKED_FC)}
    how[CARD] = {**VARIANTS[VANILLA], "edit": wrong_fc}
    found = {name: make(root / f"found-{number}", **options) for number, (name, options) in enumerate(how.items())}
    mended = {f"{name}, mended": make(root / f"mended-{n}", **options) for n, (name, options) in enumerate(how.items())}
    for folder in mended.values():
        repair(folder, RepairSource(TINY))
    alone = make(root / "alone", **VARIANTS[PACKED_FC])
    repair(alone, None)
    smaller = make(root / "int4", **VARIANTS[VANILLA])
    repair(smaller, RepairSource(TINY), precision="int4")
    return {**found, **mended, f"{PACKED_FC}, dequantized": alone, "int4": smaller}


@pytest.fixture(scope="module")
def drafted(vllm_python: str, published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Greedy, one draft token, more than 5,000 drafted; one process for all that are to be compared."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.json"
    prompts.write_text(json.dumps(python_prompts(COUNT)))
    names = [name for name in published if name.endswith((", mended", ", dequantized")) or name in {CARD, "int4"}]
    script, draft = Path(__file__).parent / "try_all.py", ROOT / "infra" / "dev" / "engines" / "draft.py"
    command = [vllm_python, script, draft, prompts, str(TOKENS), *(str(published[name]) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {name: found["with"] for name, found in zip(names, json.loads(done.stdout), strict=True)}
    for name, result in results.items():
        print(f"{name}: {result['error'] or ''} {result['accepted']} of {result['drafted']}: {result['acceptance']}")
    return results


def test_each_is_diagnosed_as_what_it_is(published: dict[str, Path]) -> None:
    vanilla = inspect_checkpoint(published[VANILLA], deep=True)
    assert vanilla.mtp.precision == "BF16+INT4" and vanilla.engines["vllm"].mtp is True
    assert vanilla.problems == []
    packed = inspect_checkpoint(published[PACKED_FC])
    assert packed.engines["vllm"].to_json() | {"reason": ""} == {"loads": True, "mtp": False, "reason": ""}
    assert any("mtp.fc.qweight is packed" in problem for problem in packed.problems)
    (wrong,) = inspect_checkpoint(published[CARD], deep=True).problems
    assert "mtp.fc.weight was dequantized from 4 bits with a zero point that is one off" in wrong


def test_every_mended_head_is_the_bases_and_has_no_problem(published: dict[str, Path]) -> None:
    head = {n: raw for n, raw in all_tensors(TINY).items() if n.startswith("mtp.")}
    for name, folder in published.items():
        if name.endswith(", mended"):
            assert {n: raw for n, raw in all_tensors(folder).items() if n.startswith("mtp.")} == head
            assert inspect_checkpoint(folder, deep=True).problems == []


def test_every_mended_checkpoint_drafts_as_the_one_with_the_bases_head(drafted: dict[str, Any]) -> None:
    sound = drafted[f"{SOUND}, mended"]
    assert sound["drafted"] >= 5000 and sound["acceptance"] > 0.8 and sound["warnings"] == []
    for name, result in drafted.items():
        if name.endswith(", mended"):
            assert result["error"] is None and result["warnings"] == []
            assert (result["drafted"], result["accepted"]) == (sound["drafted"], sound["accepted"]), name
            assert result["outputs"] == sound["outputs"]


def test_a_head_dequantized_without_its_base_loses_little_and_by_the_cards_script_much(drafted: dict[str, Any]) -> None:
    """3 points: what packing the whole head costs here; with the zero point one off it costs 8."""
    sound, alone = drafted[f"{SOUND}, mended"], drafted[f"{PACKED_FC}, dequantized"]
    assert alone["error"] is None and alone["outputs"] == sound["outputs"]
    error = math.sqrt(2 * 0.1 * 0.9 / sound["drafted"])
    assert alone["acceptance"] > sound["acceptance"] - 0.03 - 2 * error
    assert drafted[CARD]["acceptance"] < alone["acceptance"] - 2 * error


def test_a_smaller_head_drafts_too(drafted: dict[str, Any]) -> None:
    """INT4: vLLM has no kernel for 8 bits on a CPU."""
    sound, smaller = drafted[f"{SOUND}, mended"], drafted["int4"]
    assert smaller["error"] is None and smaller["outputs"] == sound["outputs"]
    assert smaller["acceptance"] > sound["acceptance"] - 0.04
