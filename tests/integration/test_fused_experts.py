"""Bases with fused experts through quantize, mtp_fix and validate: real auto-round, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.checkpoint.checkpoint import Checkpoint
from tasks.gates import compare
from tasks.mtp_fix import mtp_fix
from tasks.quantize import quantize
from tasks.recipe import Gates
from tasks.text import find_text
from tasks.validate import RESULT, validate
from tests.bases import other_base, prepared, quantized, with_experts_apart
from tests.fp8_bases import as_fp8
from tests.pico import pico_base
from tests.unit.making import all_tensors

# What random weights say means nothing.
UNCOMPARED = Gates(max_perplexity_increase=None, min_top1_agreement=None, min_mtp_acceptance_ratio=None)


def without_head(folder: Path) -> Path:
    return other_base(folder, "qwen3_5_moe_text", fused=True, moe_intermediate_size=96)


def with_head(folder: Path) -> Path:
    return pico_base(folder, experts=4)


@pytest.mark.parametrize("make", [with_head, without_head])
def test_the_result_passes_the_gates_and_is_that_of_one_tensor_an_expert(make: Any, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    bases = {"fused": base, "apart": with_experts_apart(base, tmp_path / "experts apart")}
    made: dict[str, Path] = {}
    for name, folder in bases.items():
        (tmp_path / name).mkdir()
        store, recipe, files, text = prepared(tmp_path / name, folder)
        recipe = recipe.model_copy(update={"mtp": "keep"})
        packed = quantize(store, recipe, files, text)
        whole = mtp_fix(store, recipe, files, packed.manifest)
        made[name] = store.checkout(whole.manifest, tmp_path / name / "checkout")
        if name == "fused":
            assert all(b["loss_after"] <= b["loss_before"] for b in packed.provenance["blocks"])
            found = validate(store, recipe, files, whole.manifest, find_text("builtin:python-evaluation"))
            measured = json.loads(store.read_blob(found.manifest[RESULT]))
            assert [g for g in compare(measured, UNCOMPARED) if not g.passed] == []
            matrices = [m["name"] for m in measured["matrices"] if ".experts." in m["name"]]
            assert len(matrices) == 2 * 4 * 3 and len(measured["blocks"]) == 2
    assert all_tensors(made["fused"]) == all_tensors(made["apart"])
    assert Checkpoint.open(made["fused"]).config == Checkpoint.open(made["apart"]).config


def test_experts_that_are_kept_come_out_one_by_one_bit_for_bit(tmp_path: Path) -> None:
    base = without_head(tmp_path / "base")
    layers = {"layers.0.mlp.experts": {"bits": 16, "data_type": "fp"}}
    _, made = quantized(tmp_path, base, layers=layers)
    ours, theirs = all_tensors(made), all_tensors(with_experts_apart(base, tmp_path / "apart"))
    kept = {name for name in theirs if ".layers.0.mlp.experts." in name}
    assert len(kept) == 4 * 3 and all(ours[name] == theirs[name] for name in kept)
    assert "model.layers.1.mlp.experts.0.up_proj.qweight" in ours


def test_fused_fp8_experts_give_what_their_bf16_weights_give(tmp_path: Path) -> None:
    fused = with_head(tmp_path / "base")
    made = []
    for name, base in {"fused": fused, "apart": with_experts_apart(fused, tmp_path / "bf16")}.items():
        (tmp_path / name).mkdir()
        made.append(quantized(tmp_path / name, as_fp8(base, tmp_path / f"{name} fp8"))[1])
    assert all_tensors(made[0]) == all_tensors(made[1])
