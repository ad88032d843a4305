"""The quantize stage when the GPU's memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.bench.gpu_piece import Size, build_model
from requant.tasks.checkpoint.audit import account
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.quantizing.memory_fallback import Attempt
from tests.factories.bases import quantized

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# With long samples and small weights, a step needs most of its memory for the activations that it keeps.
SIZE = Size(
    hidden=1024, intermediate=4096, heads=4, kv_heads=2, key_heads=4, value_heads=8, nsamples=8, seqlen=4096, iters=6
)
# With these dimensions and a compiled step a batch of 8 needs about 3 GB, a single sample 1.4 GB.
WIDE = Size(hidden=2048, intermediate=8192, heads=8, kv_heads=2, key_heads=8, value_heads=16, nsamples=32, iters=12)


def settings(size: Size, **changes: int | bool) -> dict[str, int | bool]:
    names = ("iters", "nsamples", "seqlen", "batch_size")
    return {**{name: getattr(size, name) for name in names}, "group_size": 128, **changes}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("base") / "base", "mixed", SIZE)


@pytest.fixture(scope="module")
def single(base: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Measure the bytes that uncompiled tuning with one sample per step takes if there is enough memory."""
    with_one = settings(SIZE, batch_size=1, low_gpu_mem=True, torch_compile=False)
    peak = quantized(tmp_path_factory.mktemp("single"), base, **with_one)[0].provenance.document["peak_gpu_bytes"]
    assert isinstance(peak, int)
    return peak


def descend(limit_bytes: float, folder: Path, base: Path, patch: pytest.MonkeyPatch, **asked: Any) -> list[Attempt]:
    """Quantize with a limit of GPU memory. Returns the attempts, and checks the artifact and its provenance."""
    patch.setenv("REQUANT_GPU_GB", str(limit_bytes / 1e9))
    result, made = quantized(folder, base, **asked)
    attempts = [Attempt.model_validate(attempt) for attempt in result.provenance.document["attempts"]]
    print(f"at most {limit_bytes / 1e9:.2f} GB", *attempts, *result.provenance.document["blocks"], sep="\n")
    assert [a.ended for a in attempts] == ["oom"] * (len(attempts) - 1) + ["done"] and len(attempts) > 1
    assert all(a.batch_size * a.gradient_accumulate_steps == asked["batch_size"] for a in attempts)
    assert all(b["loss_after"] <= b["loss_before"] for b in result.provenance.document["blocks"])
    assert result.provenance.document["peak_gpu_bytes"] <= limit_bytes
    audit = account(Checkpoint.open(made), Checkpoint.open(base), with_head=False)
    assert audit.packed and not (audit.unaccounted or audit.altered or audit.not_finite)
    return attempts


def test_out_of_memory_it_goes_down_to_single_samples(
    base: Path, single: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = descend(1.3 * single, tmp_path, base, monkeypatch, **settings(SIZE, torch_compile=False))
    assert [a.batch_size for a in attempts] == [8, 4, 2, 1]
    assert not any(a.offload for a in attempts)


def test_where_a_single_sample_does_not_fit_activations_go_to_the_cpus_memory(
    base: Path, single: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = descend(0.8 * single, tmp_path, base, monkeypatch, **settings(SIZE, torch_compile=False))
    assert [(a.batch_size, a.offload) for a in attempts[-2:]] == [(1, False), (1, True)]


def test_a_compiled_step_goes_down_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_model(tmp_path / "base", "mixed", WIDE)
    attempts = descend(2.0e9, tmp_path, base, monkeypatch, **settings(WIDE, torch_compile=True))
    assert attempts[-1].batch_size < WIDE.batch_size
