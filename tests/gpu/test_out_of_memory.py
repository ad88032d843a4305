"""The quantize stage where the GPU's memory runs out: `make test-gpu` on a machine with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.bench.gpu_piece import Size, build_model
from tasks.checkpoint.account import account
from tasks.checkpoint.checkpoint import Checkpoint
from tests.bases import quantized

torch = pytest.importorskip("torch")
CAP_GB = 2.0  # a batch of 8 needs about 3 GB to tune a block of this size, a single sample 1.4 GB
SIZE = Size(hidden=2048, intermediate=8192, heads=8, kv_heads=2, key_heads=8, value_heads=16, nsamples=32, iters=12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [True, False])
def test_out_of_memory_ends_with_a_sound_artifact_and_says_what_it_took(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUANT_GPU_GB", str(CAP_GB))
    base = build_model(tmp_path / "base", "mixed", SIZE)
    settings = {name: getattr(SIZE, name) for name in ("iters", "nsamples", "seqlen", "batch_size")}
    result, folder = quantized(tmp_path, base, **settings, group_size=128, torch_compile=compiled)

    attempts = result.provenance["attempts"]
    print(attempts, result.provenance["blocks"], result.provenance["peak_gpu_bytes"], sep="\n")
    assert [a["ended"] for a in attempts] == ["oom"] * (len(attempts) - 1) + ["done"] and len(attempts) > 1
    assert attempts[-1]["batch_size"] < SIZE.batch_size
    assert all(a["batch_size"] * a["gradient_accumulate_steps"] == SIZE.batch_size for a in attempts)
    assert all(b["loss_after"] <= b["loss_before"] for b in result.provenance["blocks"])
    assert result.provenance["peak_gpu_bytes"] <= CAP_GB * 1e9

    found = account(Checkpoint.open(folder), Checkpoint.open(base), with_head=False)
    assert found.packed and not (found.unaccounted or found.altered or found.not_finite)
