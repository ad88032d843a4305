"""The plan against auto-round itself, on real architectures: which layers it packs, its config, every file's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.assemble import assemble
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.head import HeadFiles, keep_head
from requant.tasks.checkpoint.reading import Reading
from requant.tasks.planning.layers import choose_layers
from requant.tasks.planning.output import plan_output
from requant.tasks.recipe.base_section import Base
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.recipe.recipe import Recipe
from tests.factories.auto_round_itself import pack_with_auto_round
from tests.factories.bases import other_base
from tests.factories.pico import pico_base

BLOCKS = "model.language_model.layers"
EACH_FEATURE: list[dict[str, Any]] = [
    {"bits": 3, "sym": False},
    {"sym": False, "group_size": -1},
    {"layers": {"mlp.down_proj": {"bits": 8}, "self_attn": {"bits": 16}}},
    {"layers": {"out_proj": {"scheme": "W8A16"}}, "format": "auto_round:auto_gptq"},
    {"layers": {"q_proj": {"bits": 8}, f"{BLOCKS}.1.self_attn.q_proj": {"bits": 2}}},
]
MORE: list[dict[str, Any]] = [
    {},
    {"bits": 2, "format": "auto_round:auto_gptq"},
    {"bits": 8, "group_size": 64},
    {"group_size": 128},
    {"format": "auto_round:auto_gptq", "iters": 1, "lr": 0.01},
    {"layers": {"linear_attn": {"group_size": 64}}},
    {"layers": {"down_proj": {"bits": 8}}, "sym": False},
    {"layers": {f"{BLOCKS}.1.self_attn.o_proj": {"bits": 16, "data_type": "fp"}}},
]


@pytest.mark.parametrize(
    "changes", [*EACH_FEATURE, *(pytest.param(changes, marks=pytest.mark.slow) for changes in MORE)], ids=json.dumps
)
def test_the_plan_packs_what_auto_round_packs_and_writes_its_config(changes: dict[str, Any], tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    check(base, Quantize(**{"group_size": 32, "iters": 0, "nsamples": 2, "seqlen": 32, "batch_size": 2} | changes))


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3", "qwen3_5_moe_text"))]
)
def test_the_plan_knows_other_architectures_their_routers_and_a_packed_lm_head(kind: str, tmp_path: Path) -> None:
    base = other_base(tmp_path / kind, kind, tie_word_embeddings=kind == "llama")
    layers = {} if "moe" in kind else {"lm_head": {"bits": 8}}
    check(base, Quantize(group_size=32, iters=0, nsamples=2, seqlen=32, batch_size=2, layers=layers))


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"experts.*down_proj": {"bits": 8}, "layers.0.mlp.experts.1": {"bits": 16}},
    ],
    ids=json.dumps,
)
def test_the_plan_takes_fused_experts_apart_as_auto_round_does(layers: dict[str, Any], tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", experts=4)
    check(base, Quantize(group_size=32, iters=0, nsamples=2, seqlen=32, batch_size=2, layers=layers))


def check(folder: Path, asked: Quantize) -> None:
    """Compare with auto-round: the packed modules, their parts' shapes, the config but for what it says of the head."""
    source = Checkpoint.open(folder)
    base = split_fused_experts(source)
    result = pack_with_auto_round(folder, asked, folder.parent)
    made = Checkpoint.open(Path(result["checkpoint"]))
    chosen = choose_layers(base, asked)
    assert not chosen.problems
    theirs = made.config["quantization_config"]
    extra = {k: v for k, v in theirs.get("extra_config", {}).items() if "mtp" not in k}
    assert json.dumps({k: v for k, v in theirs.items() if k != "extra_config"}) == json.dumps(
        {k: v for k, v in chosen.quantization.items() if k != "extra_config"}
    )
    assert json.dumps(extra) == json.dumps(chosen.quantization.get("extra_config", {}))
    parts = {n: t.shape for n, t in made.tensors.items() if n.endswith((".qweight", ".qzeros", ".scales"))}
    ours: dict[str, tuple[int, ...]] = {}
    for module in chosen.quantized:
        shapes = (
            Reading.of(base.config, chosen.quantization).planned(module).shapes(*base.tensors[f"{module}.weight"].shape)
        )
        ours |= {f"{module}.{part}": shapes[part] for part in ("qweight", "qzeros", "scales")}
    assert ours == {n: shape for n, shape in parts.items() if not n.startswith("mtp.")}

    out = folder.parent / "made"
    files = assemble(base, made, result["bits"], out)
    files += keep_head(HeadFiles.read(out), source, out) if source.head else []
    recipe = Recipe(base=Base(repo_id="a/b"), quantize=asked)
    assert {file.path: file.size for file in files} == plan_output(source, recipe, {}).sizes
