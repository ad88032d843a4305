"""The quantize stage on other architectures, and its loop against auto-round's own. Real auto-round, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.checkpoint.audit import account
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.fp8 import write_dequantized
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.plots.draw import draw
from tests.factories.bases import other_base, quantized
from tests.factories.fp8_bases import as_fp8
from tests.factories.pico import pico_base

pytestmark = pytest.mark.usefixtures("quantize_forks")
KINDS = ["qwen3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (
    "llama", "qwen3_5_text", "qwen3_5_moe_text", "without head",
))]  # fmt: skip


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageResult, StageResult]:
    """One base tuned by auto-round's own loop, asked to compare with the last step, and by ours, asked not to."""
    folder = tmp_path_factory.mktemp("loops")
    base = other_base(folder / "base", "llama")
    ends = []
    for fast in (False, True):
        (folder / str(fast)).mkdir()
        ends.append(quantized(folder / str(fast), base, fast=fast, compare_last=not fast)[0])
    return ends[0], ends[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_of_this_base_is_tuned(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_LOG_LEVEL", "ERROR")  # the user's own, which hides no loss from the record
    base = pico_base(tmp_path / "base", head=False) if kind == "without head" else other_base(tmp_path / "base", kind)
    result, _ = quantized(tmp_path, base)
    blocks = result.provenance.document["blocks"]
    assert len(blocks) == 2
    for block in blocks:
        assert block["loss_after"] <= block["loss_before"] and block["output_error"] > 0
        assert "loop" not in block and "fallback" not in block
    assert [picture.name for picture in draw(None, None, result.provenance.blocks)] == ["losses"]
    reasons = result.provenance.document["settings"]["reasons"]
    assert set(reasons) == {"fast", "compare_last", "torch_compile", "low_gpu_mem"}


def test_our_loop_ends_where_auto_rounds_does(loops: tuple[StageResult, StageResult]) -> None:
    """On blocks without the delta rule: the same losses, and the artifact to the last bit."""
    assert loops[0].manifest.digest == loops[1].manifest.digest
    losses = [[(b["loss_before"], b["loss_after"]) for b in end.provenance.document["blocks"]] for end in loops]
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_auto_rounds_own_loop_keeps_the_lowest_batch_whatever_is_asked(loops: tuple[StageResult, StageResult]) -> None:
    settings = loops[0].provenance.document["settings"]
    assert settings["fast"] is False and settings["compare_last"] is False
    assert "lowest batch" in settings["reasons"]["compare_last"]


@pytest.mark.slow
def test_with_the_delta_rule_the_losses_are_the_same_to_float_noise(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", layers=3)
    losses = []
    for fast in (False, True):
        folder = tmp_path / str(fast)
        folder.mkdir()
        blocks = quantized(folder, base, fast=fast, compare_last=False)[0].provenance.document["blocks"]
        losses.append([value for b in blocks for value in (b["loss_before"], b["loss_after"])])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.slow
def test_each_block_keeps_the_last_steps_rounding_where_it_is_better_than_the_lowest_batchs(tmp_path: Path) -> None:
    """The first block is tuned alike in both runs: what is kept of it has the lower error over all samples."""
    base = pico_base(tmp_path / "base", layers=3)
    runs = {}
    for compare_last in (False, True):
        folder = tmp_path / str(compare_last)
        folder.mkdir()
        asked = {"iters": 40, "nsamples": 16, "compare_last": compare_last}
        runs[compare_last] = quantized(folder, base, **asked)[0].provenance.document["blocks"]
    assert not any("kept" in block for block in runs[False])
    for block in runs[True]:
        lower = min(block["compared"], key=block["compared"].get)
        assert (block["kept"] == "last step") == ("kept_because" not in block)
        assert block["kept"] == lower or "noise" in block["kept_because"]
    assert [runs[c][0]["loss_after"] for c in runs] == [runs[False][0]["loss_after"]] * 2
    assert runs[True][0]["kept"] == "last step" and runs[True][0]["output_error"] < runs[False][0]["output_error"]
    assert runs[True][0]["compared"]["lowest batch"] == pytest.approx(runs[False][0]["output_error"], rel=1e-3)


@pytest.mark.parametrize("scales", ["blocks", pytest.param("tensor", marks=pytest.mark.slow)])
def test_an_fp8_base_gives_what_its_bf16_weights_give(scales: str, tmp_path: Path) -> None:
    """Some layers stay at 16 bit: they come out as BF16, and nothing of FP8 is left."""
    base = as_fp8(
        pico_base(tmp_path / "bf16", layers=3, head=False), tmp_path / "fp8", scales=scales, kept=("layers.1.mlp",)
    )
    layers = {"layers.0.mlp.down_proj": {"bits": 16, "data_type": "fp"}}
    (tmp_path / "one").mkdir()
    result, folder = quantized(tmp_path / "one", base, layers=layers)
    made = Checkpoint.open(folder).sound()
    assert {t.dtype for t in made.tensors.values()} == {"BF16", "I32", "F16"}
    assert made.tensors["model.language_model.layers.0.mlp.down_proj.weight"].dtype == "BF16"
    assert made.quantization["quant_method"] == "auto-round" and not any("scale_inv" in name for name in made.tensors)
    found = account(made, Checkpoint.open(base), with_head=False)
    assert found.packed and not (found.unaccounted or found.altered or found.not_finite)

    (tmp_path / "two").mkdir()
    same = write_dequantized(Checkpoint.open(base), tmp_path / "plain")
    again, _ = quantized(tmp_path / "two", same, layers=layers)
    weights = [{f.path: f.sha256 for f in r.manifest.files} for r in (result, again)]
    assert weights[0] == weights[1]

    tensor = made.tensors["model.language_model.layers.0.mlp.down_proj.weight"]
    raw = bytearray(tensor.path.read_bytes())
    raw[tensor.begin] ^= 1
    tensor.path.write_bytes(raw)
    assert account(Checkpoint.open(folder), Checkpoint.open(base), with_head=False).altered
