"""The rules for vLLM say what vLLM's own config classes say, over generated configs."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import vllm
from requant.tasks.checkpoint.compat.layers import Tree
from requant.tasks.checkpoint.compat.rule import Layer, NotLoadable, Patterns, Renames
from requant.tasks.checkpoint.config import ModelConfig, QuantizationConfig
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import modules_of
from tests.engines.cases import ARCHITECTURES, METHODS, generate

COUNT = 6000
ASK = Path(__file__).parent / "ask_vllm.py"


def checkpoint_of(case: dict[str, Any]) -> Checkpoint:
    tensors = {n: Tensor(n, dtype, (1, 1), Path("x"), 0, 0) for n, dtype in case["tensors"].items()}
    return Checkpoint(Path("x"), ModelConfig(architectures=[case["architecture"]]), tensors, (), None)


def tree_of(case: dict[str, Any]) -> Tree:
    known = vllm.ARCHITECTURES[case["architecture"]]
    fused = known.draft_fused if case["draft"] and known.draft_fused is not None else known.tree.fused
    return Tree(known.tree.renames, fused, known.tree.plain)


def layers_of(case: dict[str, Any]) -> list[Layer]:
    weights = [Tensor(f"{name}.weight", "BF16", (1, 1), Path("x"), 0, 0) for name in case["modules"]]
    layers = tree_of(case).layers(modules_of(weights).values())
    legacy = [Layer(layer.name, layer.kind, "FusedMoE", layer.parts) for layer in layers if layer.kind == "experts"]
    return layers + legacy


def ours(case: dict[str, Any]) -> Any:
    """The rules' answer in the words of ask_vllm.py."""
    tree = tree_of(case)
    try:
        rule = vllm.read_rule(
            QuantizationConfig(case["config"]), tree.renames, tree.fused, Patterns(), checkpoint_of(case)
        )
    except NotLoadable as refusal:
        return {"error": str(refusal)}
    assert rule is not None
    return [_answer(rule, layer) for layer in layers_of(case)]


def _answer(rule: Any, layer: Layer) -> Any:
    try:
        scheme = rule.scheme(layer)
    except NotLoadable as refusal:
        return {"error": str(refusal)}
    group = list(scheme.group_size) if isinstance(scheme.group_size, tuple) else scheme.group_size
    return [scheme.bits, group, scheme.sym] if scheme.quantized else "plain"


def told(answer: Any) -> Any:
    """An answer without the words of an error."""
    return "error" if isinstance(answer, dict) else answer


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    return generate(COUNT)


@pytest.fixture(scope="module")
def told_by_vllm(
    vllm_python: str, cases: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What vLLM says; one start of it for all."""
    questions = [{**case, "layers": [vars(layer) for layer in layers_of(case)]} for case in cases]
    path = tmp_path_factory.mktemp("ask") / "cases.json"
    path.write_text(json.dumps({"architectures": ARCHITECTURES, "cases": questions}))
    done = subprocess.run([vllm_python, ASK, path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.parametrize("method", METHODS)
def test_the_rules_answer_as_vllm_does(method: str, cases: list[dict[str, Any]], told_by_vllm: dict[str, Any]) -> None:
    answered = zip(cases, told_by_vllm["answers"], strict=True)
    mine = [(case, answer) for case, answer in answered if case["method"] == method]
    kinds: Counter[str] = Counter()
    different = []
    for case, answer in mine:
        our = ours(case)
        if isinstance(answer, dict) or isinstance(our, dict):
            kinds["refused"] += 1
            late = isinstance(answer, list) and any(told(a) == "error" for a in answer)  # at the first layer that asks
            if told(our) != "error" or not (late or told(answer) == "error"):
                different.append({"config": case["config"], "vllm": answer, "ours": our})
            continue
        for layer, theirs, own in zip(layers_of(case), answer, our, strict=True):
            kinds["error" if isinstance(theirs, dict) else "plain" if theirs == "plain" else "quantized"] += 1
            if told(theirs) != told(own):
                different.append({
                    "config": case["config"], "architecture": case["architecture"], "draft": case["draft"],
                    "layer": layer.name, "vllm": theirs, "ours": own,
                })  # fmt: skip
    print(f"{method}: {len(mine)} configs, {dict(kinds)}, {len(different)} differences")
    assert not different, json.dumps(different[:3], indent=1)
    assert min(kinds["plain"], kinds["quantized"]) > 100 and kinds["error"] + kinds["refused"] > 10, kinds


def test_the_tables_of_architectures_are_vllms(told_by_vllm: dict[str, Any]) -> None:
    """Renamed prefixes and fused layers, of main and draft models, as vLLM's classes have them."""
    found = told_by_vllm["tables"]
    for main, draft in ARCHITECTURES.items():
        known = vllm.ARCHITECTURES[main]
        assert known.tree.renames == Renames(tuple(found[main][0].items()))
        assert {k: list(v) for k, v in known.tree.fused.items()} == found[main][1]
        assert found[draft][0] == {}
        own = None if known.draft_fused is None else {k: list(v) for k, v in known.draft_fused.items()}
        assert own == found[draft][1]
