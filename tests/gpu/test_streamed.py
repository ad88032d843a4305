"""Quality measured on a GPU that cannot hold all weights, block by block: it gives the values of a GPU that can."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.recipe.recipe import Gates
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validate import validate_folders
from requant.tasks.validating import measure as measuring
from requant.tasks.validating.gates import judge
from requant.tasks.validating.measure import measure, run_settings
from requant.tasks.validating.model import RunSettings
from tests.factories.checkpoints import write_quantized
from tests.factories.pico import pico_base

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# 500 MB of weights, 13 MB per block. cuBLAS needs 64 MB.
LAYERS, INTERMEDIATE, LIMIT_BYTES = 40, 32768, 320_000_000
ALWAYS = {"structure", "lossless", "finite", "files", "context", "same_tokens", "long_context", "vision_output"}


def test_block_by_block_on_a_gpu_the_values_are_those_of_all_weights_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LENGTH": 256, "PROMPTS": 2, "GENERATED": 12}.items():
        monkeypatch.setattr(measuring, name, value)
    monkeypatch.setitem(
        measuring.MAX_TEXT_TOKENS, "cuda", 2048
    )  # A longer text would take more time than everything else.
    base = pico_base(tmp_path / "base", layers=LAYERS, intermediate=INTERMEDIATE)
    made = write_quantized(base, tmp_path)
    assert sum(t.nbytes for t in Checkpoint.open(base).tensors.values()) > 1.5 * LIMIT_BYTES
    whole = measure(base, EVALUATION, run_settings(base))
    assert whole.generated.shape == (2, 12) and whole.speculation.size

    monkeypatch.setenv("REQUANT_GPU_GB", str(LIMIT_BYTES / 1e9))
    assert run_settings(base) == RunSettings(torch.device("cuda"), torch.bfloat16)
    print(f"{torch.cuda.memory_allocated():,} bytes are held")
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    streamed = measure(base, EVALUATION, run_settings(base))
    print(f"base: {time.monotonic() - began:.1f} s, {torch.cuda.max_memory_allocated():,} bytes at most")
    assert streamed.generated.shape == (2, 8) and not streamed.speculation.size
    for name in ("tokens", "nll", "top1", "drafts"):
        np.testing.assert_array_equal(getattr(streamed, name), getattr(whole, name))
    np.testing.assert_array_equal(streamed.generated[:, 0], whole.generated[:, 0])

    began = time.monotonic()
    values = validate_folders(made, base)
    peak = torch.cuda.max_memory_allocated()
    print(f"both, compared: {time.monotonic() - began:.1f} s, {peak:,} bytes at most")
    assert peak <= LIMIT_BYTES
    gates = judge(values, Gates())
    print(*(gate.to_json() for gate in gates), sep="\n")
    passed = {gate.name for gate in gates if gate.passed}
    assert passed >= ALWAYS
    blocks, behaviour = values.divergence.blocks or (), values.behaviour
    assert len(blocks) == LAYERS and all(0 < block.error < 1 for block in blocks)
    figures = (behaviour.perplexity_increase, values.divergence.kl_divergence, behaviour.quantized.mtp_acceptance)
    assert all(figure is not None and math.isfinite(figure) for figure in figures)
