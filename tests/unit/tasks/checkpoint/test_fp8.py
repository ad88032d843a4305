"""FP8 checkpoints read as BF16 ones: bit for bit what transformers makes of them, and nothing of FP8 left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.config import QuantizationConfig
from requant.tasks.checkpoint.fp8 import STRIPE_ROWS, dequantize_fp8, dequantized_tensors, values_of, write_dequantized
from requant.tasks.checkpoint.head import head_tensors
from requant.tasks.checkpoint.header import CHUNK_BYTES, Tensor
from requant.tasks.checkpoint.packing import float_rows, to_numpy
from requant.tasks.checkpoint.writer import write_shard
from requant.tasks.errors import CheckpointError
from requant.tasks.validating.model import RunSettings, state_dict
from tests.factories.checkpoints import write_checkpoint
from tests.factories.fp8_bases import as_fp8
from tests.factories.pico import pico_base

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def made(folder: Path, weight: torch.Tensor, scale: torch.Tensor, config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of one FP8 weight."""
    kind = next(name for name, dtype in FP8.items() if dtype == weight.dtype)
    scales = {torch.float32: "F32", torch.uint8: "U8"}[scale.dtype]
    tensors = {
        "a.weight_scale_inv": (scales, tuple(scale.shape), scale.numpy().tobytes()),
        "a.weight": (kind, tuple(weight.shape), weight.view(torch.uint8).numpy().tobytes()),
    }
    write_checkpoint(folder, {"model-00001-of-00001.safetensors": tensors}, config or BLOCKS)
    return Checkpoint.open(folder)


def drawn(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def bits(tensor: Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(tensor.read()), dtype=torch.bfloat16).reshape(tensor.shape)


@pytest.mark.parametrize("kind", FP8)
def test_every_code_is_the_number_that_torch_reads(kind: str) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(FP8[kind]).float().numpy()
    np.testing.assert_array_equal(values_of(kind), theirs)


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("grid", [(6, 2), (768, 1), (1, 1), ()])
def test_a_weight_is_bit_for_bit_what_transformers_makes_of_it(
    kind: str, grid: tuple[int, ...], tmp_path: Path
) -> None:
    weight = drawn(768, 256, dtype=FP8[kind])
    scale = torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.01
    (ours,) = dequantize_fp8(made(tmp_path, weight, scale)).tensors.values()
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale.view(scale.shape or (1, 1)), torch.bfloat16)
    assert (ours.name, ours.dtype, ours.shape) == ("a.weight", "BF16", (768, 256))
    assert torch.equal(bits(ours), theirs)


def test_scales_may_be_powers_of_two_in_a_byte(tmp_path: Path) -> None:
    weight, scale = drawn(128, 256), torch.tensor([[120, 130]], dtype=torch.uint8)
    (ours,) = dequantize_fp8(made(tmp_path, weight, scale)).tensors.values()
    assert torch.equal(bits(ours), Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16))


def test_blocks_at_the_edges_may_be_smaller(tmp_path: Path) -> None:
    """DeepSeek's rule: the scales are those of a weight filled up to whole blocks."""
    weight, scale = drawn(200, 300), torch.rand(2, 3) + 0.01
    (ours,) = dequantize_fp8(made(tmp_path, weight, scale)).tensors.values()
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    assert torch.equal(bits(ours), (weight.float() * wide).bfloat16())


def test_fused_experts_have_the_scales_of_each_matrix(tmp_path: Path) -> None:
    weight, scale = drawn(3, 64, 128), torch.rand(3, 2, 4) + 0.01
    checkpoint = made(tmp_path, weight, scale)
    (ours,) = dequantize_fp8(checkpoint).tensors.values()
    wide = scale.repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert torch.equal(bits(ours), (weight.float() * wide).bfloat16())


@pytest.mark.parametrize("grid", [(5, 2), (2, 3), (0, 2), (7,), (1, 2, 2)])
def test_scales_that_do_not_fit_are_refused_by_name(grid: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_inv \(F32 .*does not fit a\.weight \[768, 256\]"):
        dequantize_fp8(made(tmp_path, drawn(768, 256), torch.ones(grid)))


def test_a_weight_without_a_scale_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = made(tmp_path, drawn(768, 256), torch.ones(6, 2))
    with pytest.raises(CheckpointError, match=r"a\.weight is F8_E4M3 and has no a\.weight_scale_inv"):
        dequantized_tensors([checkpoint.tensors["a.weight"]], checkpoint.config)


def test_memory_follows_some_rows_and_chunks_are_those_of_a_file(tmp_path: Path) -> None:
    weight = drawn(3 * STRIPE_ROWS, 12288)
    (ours,) = dequantize_fp8(made(tmp_path, weight, torch.ones(12, 96))).tensors.values()
    write_shard(tmp_path / "out", "model.safetensors", [ours])
    sizes = [len(chunk) for chunk in ours.chunks()]
    assert len(sizes) > 1 and sizes[:-1] == [CHUNK_BYTES] * (len(sizes) - 1)
    assert [len(rows) for rows in float_rows(ours)] == [STRIPE_ROWS] * 3
    assert np.array_equal(np.concatenate(list(float_rows(ours))), to_numpy(ours))


@pytest.mark.parametrize("scales", ["blocks", "tensor"])
def test_nothing_of_fp8_is_left_of_a_base(scales: str, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "bf16")
    fp8 = Checkpoint.open(as_fp8(base, tmp_path / "fp8", scales=scales)).sound()
    source = Checkpoint.open(base)
    assert not fp8.problems and any(t.dtype == "F8_E4M3" for t in fp8.tensors.values())
    same = dequantize_fp8(fp8)
    assert set(same.tensors) == set(source.tensors) and same.config == source.config and not same.quantization
    assert {t.dtype for t in same.tensors.values()} == {"BF16"}
    for name, tensor in same.tensors.items():
        there, here = to_numpy(source.tensors[name]).astype(np.float32), to_numpy(tensor)
        assert np.linalg.norm(here - there) <= 0.05 * np.linalg.norm(there)
    assert dequantize_fp8(source) is source

    written = Checkpoint.open(write_dequantized(fp8, tmp_path / "plain")).sound()
    assert written.config == same.config and (tmp_path / "plain" / "tokenizer.json").exists()
    assert all(t.read() == same.tensors[name].read() for name, t in written.tensors.items())
    state = state_dict(fp8.tensors.values(), fp8, RunSettings(torch.device("cpu"), torch.bfloat16))
    assert all(torch.equal(state[name], bits(tensor)) for name, tensor in same.tensors.items())


def test_a_head_is_bf16_in_an_int4_checkpoint_and_fp8_in_an_fp8_one(tmp_path: Path) -> None:
    fp8 = Checkpoint.open(as_fp8(pico_base(tmp_path / "bf16"), tmp_path / "fp8"))
    made = head_tensors(fp8, "keep", QuantizationConfig(quant_method="auto-round", bits=4, group_size=32))
    assert {t.dtype for t in made.values()} == {"BF16"} and not any("scale" in name for name in made)
    kept = head_tensors(fp8, "keep", fp8.quantization)
    assert {t.dtype for t in kept.values()} == {"BF16", "F8_E4M3", "F32"}
    packed = head_tensors(fp8, "int8", QuantizationConfig(quant_method="auto-round", bits=4, group_size=32))
    assert any(name.endswith("qweight") for name in packed) and all(t.read() for t in packed.values())


def test_inspect_and_engines_read_the_base_as_fp8(tmp_path: Path) -> None:
    folder = as_fp8(pico_base(tmp_path / "bf16"), tmp_path / "fp8")
    found = Judgement.of(Checkpoint.open(folder)).verdicts
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert all(engine.loads for engine in found.values())
