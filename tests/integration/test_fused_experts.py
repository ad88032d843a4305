"""Bases with fused experts through quantize, mtp_fix and validate: real auto-round, on a CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.mtp_fix import mtp_fix
from requant.tasks.quantize import quantize
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.recipe.recipe import Gates
from requant.tasks.texts.text import find_text
from requant.tasks.validate import read_values, validate
from requant.tasks.validating.gates import Gate, judge
from requant.tasks.validating.model import RunSettings, load_model
from tests.factories.bases import other_base, prepared, quantized
from tests.factories.checkpoints import all_tensors
from tests.factories.fp8_bases import as_fp8
from tests.factories.moe_bases import trained_moe, with_experts_apart
from tests.factories.pico import pico_base

pytestmark = pytest.mark.usefixtures("quantize_forks")
KEPT = {"layers.0.mlp.experts": {"bits": 16, "data_type": "fp"}}
# Random weights pass no gate that compares what two models say.
RANDOM = Gates(max_perplexity_increase=None, max_kl_divergence=None, min_top1_agreement=None)
# In a process of its own: auto-round changes transformers where it is loaded.
THEIRS = """
import sys, torch, transformers
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32, device_map="cpu")
with torch.no_grad():
    model(input_ids=torch.arange(300, 340)[None]).logits.float().numpy().tofile(sys.argv[2])
"""


def made_of(base: Path, folder: Path, gates: Gates, **settings: Any) -> tuple[Path, list[Gate]]:
    """A base through the three stages, head kept: the result, and what the gates say."""
    folder.mkdir()
    store, recipe, files, text = prepared(folder, base, **settings)
    recipe = recipe.model_copy(update={"mtp": "keep"})
    packed = quantize(store, recipe, files, text)
    assert all(block.loss_after <= block.loss_before for block in packed.provenance.blocks)
    check_expert_counts(packed.provenance.experts, Checkpoint.open(base), recipe.quantize)
    whole = mtp_fix(store, recipe, files, packed.manifest).manifest
    found = validate(store, recipe, files, whole, find_text("builtin:python-evaluation"))
    measured = read_values(store, found)
    assert any(".mlp.experts.3.down_proj" in matrix.name for matrix in measured.matrices or ())
    return store.checkout(whole, folder / "checkout"), judge(measured, gates)


def check_expert_counts(experts: Mapping[str, Sequence[int]], base: Checkpoint, asked: Quantize) -> None:
    """Each token of the calibration is counted for each of its experts, in each block."""
    text = base.text_config
    assert len(experts) == text["num_hidden_layers"]
    expected = asked.nsamples * asked.seqlen * text["num_experts_per_tok"]
    assert all(len(tokens) == text["num_experts"] and sum(tokens) == expected for tokens in experts.values())


@pytest.mark.slow
def test_a_trained_moe_passes_every_gate_and_transformers_reads_it_as_we_do(tmp_path: Path) -> None:
    base = trained_moe(tmp_path / "base")
    few_steps = Gates(max_perplexity_increase=0.1, min_top1_agreement=0.8)
    made, gates = made_of(base, tmp_path / "made", few_steps, iters=20, nsamples=16, seqlen=128)
    assert [gate for gate in gates if not gate.passed] == []
    assert {"mtp_acceptance_ratio", "weight_slope", "block_error", "vision_output"} <= {gate.name for gate in gates}
    head = {name: raw for name, raw in all_tensors(base).items() if name.startswith("mtp.")}
    assert {name: raw for name, raw in all_tensors(made).items() if name.startswith("mtp.")} == head

    command = [sys.executable, "-c", THEIRS, str(made), str(tmp_path / "logits")]
    subprocess.run(command, check=True, capture_output=True)
    theirs = torch.from_numpy(np.fromfile(tmp_path / "logits", np.float32))
    ours = load_model(Checkpoint.open(made), RunSettings(torch.device("cpu"), torch.float32))
    with torch.no_grad():
        logits = ours(input_ids=torch.arange(300, 340)[None]).logits
    assert (theirs - logits.flatten()).abs().max() < 0.1  # it computes in float16


def test_with_its_head_it_is_what_the_same_base_gives_with_one_tensor_an_expert(tmp_path: Path) -> None:
    """The experts of one block are kept, and come out one by one too; the head's stay fused, to the bit."""
    base = pico_base(tmp_path / "base", experts=4)
    gates = RANDOM.model_copy(update={"min_mtp_acceptance_ratio": None})
    check_with_experts_apart(base, gates, tmp_path)


@pytest.mark.slow
def test_without_a_head_it_is_what_the_same_base_gives_with_one_tensor_an_expert(tmp_path: Path) -> None:
    base = other_base(tmp_path / "base", "qwen3_5_moe_text", fused=True, moe_intermediate_size=96)
    check_with_experts_apart(base, RANDOM, tmp_path)


def check_with_experts_apart(base: Path, gates: Gates, folder: Path) -> None:
    """Compare the base's result, the experts of its first block kept, with that of the same base taken apart."""
    apart = with_experts_apart(base, folder / "experts apart")
    made, passed = made_of(base, folder / "fused", gates, layers=KEPT)
    assert [gate for gate in passed if not gate.passed] == []
    ours, theirs = all_tensors(made), all_tensors(apart)
    head = {name: raw for name, raw in all_tensors(base).items() if name.startswith("mtp.")}
    assert {name: ours.pop(name) for name in head} == head
    (folder / "apart").mkdir()
    assert ours == all_tensors(quantized(folder / "apart", apart, layers=KEPT)[1])
    kept = {name for name in theirs if ".layers.0.mlp.experts." in name and name not in head}
    assert len(kept) == 4 * 3 and all(ours[name] == theirs[name] for name in kept)


@pytest.mark.slow
def test_fused_fp8_experts_give_what_their_bf16_weights_give(tmp_path: Path) -> None:
    fused = pico_base(tmp_path / "base", experts=4)
    made = []
    for name, base in {"fused": fused, "apart": with_experts_apart(fused, tmp_path / "bf16")}.items():
        (tmp_path / name).mkdir()
        made.append(quantized(tmp_path / name, as_fp8(base, tmp_path / f"{name} fp8"))[1])
    assert all_tensors(made[0]) == all_tensors(made[1])
