"""Fused experts are read as one matrix each: the bytes that transformers puts there, packed or kept, and told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.audit import account
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts, unknown_layout
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.head import HEAD_SHARD
from requant.tasks.checkpoint.weight_error import fidelity
from requant.tasks.errors import CheckpointError
from requant.tasks.planning.checks import base_problems
from requant.tasks.planning.output import plan_output
from requant.tasks.recipe.loader import parse_recipe
from tests.factories.bases import other_base
from tests.factories.checkpoints import (
    all_tensors,
    edited,
    raw_tensors,
    write_quantized,
)
from tests.factories.fp8_bases import as_fp8
from tests.factories.moe_bases import with_experts_apart
from tests.factories.pico import pico_base

MAIN = "model-00001-of-00001.safetensors"
EXPERTS = "model.language_model.layers.0.mlp.experts"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_base(tmp_path / "base", experts=3)


def contents(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (t.dtype, t.shape, t.read()) for name, t in checkpoint.tensors.items()}


def test_each_matrix_is_a_range_of_the_fused_tensors_bytes(base: Path, tmp_path: Path) -> None:
    fused = Checkpoint.open(base)
    apart = split_fused_experts(fused)
    assert contents(apart) == all_tensors(with_experts_apart(base, tmp_path / "apart"))
    assert apart.head == fused.head and "mtp.layers.0.mlp.experts.gate_up_proj" in apart.tensors
    whole, view = fused.tensors[f"{EXPERTS}.gate_up_proj"], apart.tensors[f"{EXPERTS}.1.up_proj.weight"]
    assert view.path == whole.path and view.begin - whole.begin == 3 * view.nbytes == whole.nbytes // 2
    assert split_fused_experts(apart) is apart


def test_the_layout_is_transformers_own(tmp_path: Path) -> None:
    """One model, saved as it lies in memory and with transformers' conversion to one tensor an expert."""
    changes = {"moe_intermediate_size": 96, "num_experts": 3}
    fused, apart = (other_base(tmp_path / str(f), "qwen3_5_moe_text", fused=f, **changes) for f in (True, False))
    assert "model.layers.1.mlp.experts.down_proj" in all_tensors(fused)
    assert contents(split_fused_experts(Checkpoint.open(fused))) == all_tensors(apart)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "qwen3_vl_moe_text"}, {"num_experts": 4}, {"moe_intermediate_size": None}, {"num_experts": 0}],
    ids=str,
)
def test_a_layout_that_is_not_known_is_left_and_refused_by_name(change: dict[str, Any], base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    checkpoint.config["text_config"] |= change
    assert split_fused_experts(checkpoint) is checkpoint
    problem = unknown_layout(checkpoint)
    assert problem and problem.startswith(f"the experts of the base lie fused in {EXPERTS}.down_proj [3, 64, 96]")
    assert problem in list(base_problems(checkpoint, parse_recipe({"base": {"repo_id": "a/b"}})))


def test_a_known_layout_is_not_refused_nor_is_a_layers_own_name(base: Path) -> None:
    layers = {f"{EXPERTS}.2.down_proj": {"bits": 8}}
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"layers": layers}})
    assert list(base_problems(Checkpoint.open(base), recipe)) == []


def test_a_matrix_that_is_there_twice_is_refused(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    view = split_fused_experts(checkpoint).tensors[f"{EXPERTS}.0.down_proj.weight"]
    both = replace(checkpoint, tensors={**checkpoint.tensors, view.name: view})
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj\.weight is there by itself and fused"):
        split_fused_experts(both)


def test_more_experts_than_any_model_has_are_refused_before_they_are_made(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    checkpoint.config["text_config"]["num_experts"] = 1 << 40
    down = checkpoint.tensors[f"{EXPERTS}.down_proj"]
    checkpoint.tensors[down.name] = replace(down, shape=(1 << 40, *down.shape[1:]))
    with pytest.raises(CheckpointError, match="more than any model has"):
        split_fused_experts(checkpoint)


def test_the_result_is_that_of_the_same_base_with_one_tensor_an_expert(base: Path, tmp_path: Path) -> None:
    """With the experts of one block kept at 16 bits: these come out one by one too."""
    apart = with_experts_apart(base, tmp_path / "apart")
    made, same = (
        all_tensors(write_quantized(source, tmp_path / name, kept=EXPERTS))
        for name, source in {"from fused": base, "from apart": apart}.items()
    )
    assert made == same
    one = f"{EXPERTS}.2.up_proj.weight"
    assert made[one] == all_tensors(apart)[one]
    assert [name for name in made if name.endswith("gate_up_proj")] == ["mtp.layers.0.mlp.experts.gate_up_proj"]


def test_every_matrix_of_an_expert_is_accounted_for(base: Path, tmp_path: Path) -> None:
    made = write_quantized(base, tmp_path / "quantized")
    found = account(Checkpoint.open(made), Checkpoint.open(base), with_head=True)
    assert found.packed == sum(name.endswith(".qweight") for name in all_tensors(made)) > 2 * 3 * 3
    assert not (found.unaccounted or found.altered or found.not_finite or found.files or found.context)
    with edited(made, MAIN) as tensors:
        del tensors[f"{EXPERTS}.1.up_proj.qweight"]
    found = account(Checkpoint.open(made), Checkpoint.open(base), with_head=True)
    assert f"{EXPERTS}.1.up_proj.weight of the base is missing" in found.unaccounted


def test_experts_that_someone_left_fused_are_compared_as_they_are(base: Path, tmp_path: Path) -> None:
    made = write_quantized(base, tmp_path / "quantized")
    whole = all_tensors(base)[f"{EXPERTS}.down_proj"]
    with edited(made, MAIN) as tensors:
        for name in [name for name in tensors if name.startswith(EXPERTS) and ".down_proj." in name]:
            del tensors[name]
        tensors[f"{EXPERTS}.down_proj"] = whole
    found = account(Checkpoint.open(made), Checkpoint.open(base), with_head=True)
    assert not (found.unaccounted or found.altered)
    with edited(made, MAIN) as tensors:
        tensors[f"{EXPERTS}.down_proj"] = (*whole[:2], bytes(1) + whole[2][1:])
    found = account(Checkpoint.open(made), Checkpoint.open(base), with_head=True)
    assert found.altered == [f"{EXPERTS}.down_proj differs from the base's"]


def test_experts_of_the_head_may_be_apart_and_may_not_be_packed(base: Path, tmp_path: Path) -> None:
    made = write_quantized(base, tmp_path / "quantized")
    fused = "mtp.layers.0.mlp.experts.down_proj"
    apart = split_fused_experts(Checkpoint.open(base), head_too=True).tensors
    views = {name: t for name, t in apart.items() if name.startswith("mtp.") and name.endswith("down_proj.weight")}
    with edited(made, HEAD_SHARD) as tensors:
        del tensors[fused]
        tensors |= {name: (t.dtype, t.shape, t.read()) for name, t in views.items()}
    found = account(Checkpoint.open(made), Checkpoint.open(base), with_head=True)
    assert not (found.unaccounted or found.altered)
    packed = raw_tensors(made / MAIN)
    with edited(made, HEAD_SHARD) as tensors:
        del tensors["mtp.layers.0.mlp.experts.1.down_proj.weight"]
        parts = ("qweight", "qzeros", "scales")
        tensors |= {f"mtp.layers.0.mlp.experts.1.down_proj.{p}": packed[f"{EXPERTS}.1.down_proj.{p}"] for p in parts}
    found = account(Checkpoint.open(made), Checkpoint.open(base), with_head=True)
    assert found.altered == ["mtp.layers.0.mlp.experts.1.down_proj of the MTP head is packed"]


def test_each_matrix_is_measured_against_its_own_slice(base: Path, tmp_path: Path) -> None:
    made = write_quantized(base, tmp_path / "quantized")
    before = {m.name: m for m in fidelity(Checkpoint.open(made), Checkpoint.open(base))}
    assert len([name for name in before if name.startswith(EXPERTS)]) == 9
    assert all(abs(m.slope - 1) < 0.02 and m.error < 0.15 for m in before.values())
    gate, up = f"{EXPERTS}.0.gate_proj", f"{EXPERTS}.0.up_proj"
    with edited(made, MAIN) as tensors:
        for part in ("qweight", "scales"):
            names = f"{gate}.{part}", f"{up}.{part}"
            tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    after = {m.name: m for m in fidelity(Checkpoint.open(made), Checkpoint.open(base))}
    changed = {name for name, m in after.items() if m != before[name]}
    assert changed == {f"{gate}.weight", f"{up}.weight"} and all(abs(after[n].slope) < 0.2 for n in changed)


def test_fp8_experts_are_the_bf16_ones_that_their_scales_give(base: Path, tmp_path: Path) -> None:
    apart = Checkpoint.open(as_fp8(with_experts_apart(base, tmp_path / "apart"), tmp_path / "apart8", head=False))
    fused = Checkpoint.open(as_fp8(base, tmp_path / "fused8", head=False))
    assert fused.tensors[f"{EXPERTS}.gate_up_proj"].dtype == "F8_E4M3"
    assert contents(split_fused_experts(fused)) == contents(apart)
    assert contents(dequantize_fp8(split_fused_experts(fused))) == contents(dequantize_fp8(apart))
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"group_size": 32}})
    assert plan_output(fused, recipe, {}).problems == []


def test_a_scale_for_rows_of_two_matrices_is_refused(base: Path, tmp_path: Path) -> None:
    """The last rows of gate_proj and the first of up_proj in one block."""
    fused = Checkpoint.open(as_fp8(base, tmp_path / "fp8", head=False))
    fused.config["quantization_config"]["weight_block_size"] = [64, 32]
    assert unknown_layout(split_fused_experts(fused))


def test_a_tensor_of_no_expert_with_three_sides_is_none_of_this(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico_base(tmp_path / "base"))
    assert any(len(t.shape) == 3 for t in checkpoint.tensors.values())
    assert split_fused_experts(checkpoint) is checkpoint and unknown_layout(checkpoint) is None
