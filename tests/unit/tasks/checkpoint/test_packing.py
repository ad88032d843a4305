"""dequantize against auto-round's own packers and its own torch kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import save_file

from requant.tasks.checkpoint.dequantize import unpack
from requant.tasks.checkpoint.header import Tensor, read_header
from requant.tasks.checkpoint.packing import PackingScheme, to_numpy
from requant.tasks.checkpoint.torch_tensor import to_torch
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import from_bf16, rounded, safetensors_bytes
from tests.factories.dequantized import dequantize

OUT, IN = 64, 192


def levels(bits: int, group_size: int, sym: bool, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Scales [out, groups], zero points, the integers [out, in] and the weight `(q - zero) * scale` they stand for."""
    random = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-IN // group_size)
    size = IN if group_size == -1 else group_size
    scales = (torch.rand(OUT, groups, generator=random) * 0.03 + 0.01).half().float()
    zeros = torch.randint(1, 2**bits, (OUT, groups), generator=random).float()
    if sym:
        zeros = torch.full((OUT, groups), float(2 ** (bits - 1)))
    integers = torch.randint(0, 2**bits, (OUT, IN), generator=random).float()
    spread = scales.repeat_interleave(size, 1)[:, :IN], zeros.repeat_interleave(size, 1)[:, :IN]
    return scales, zeros, integers, (integers - spread[1]) * spread[0]


def linear_of(weight: Any) -> torch.nn.Linear:
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = weight
    return linear


def packed_by(module: Any, bits: int, group_size: int, scales: Any, zeros: Any, weight: Any, sym: bool) -> Any:
    layer = module.QuantLinear(bits, group_size, IN, OUT, bias=False)
    layer.device = torch.device("cpu")
    layer.pack(linear_of(weight), scales, int(zeros[0, 0]) if sym else zeros, None, device="cpu")
    return layer


def parts_of(layer: Any, folder: Path) -> dict[str, Tensor]:
    """The layer's buffers through a file, as a stage meets them."""
    save_file({k: v.contiguous() for k, v in layer.state_dict().items()}, folder / "x.safetensors")
    return read_header(folder / "x.safetensors")


GPTQ = [(b, g, s) for b in (2, 3, 4, 8) for g in (32, 64, -1) for s in (True, False)]


@pytest.mark.parametrize(("bits", "group_size", "sym"), GPTQ)
def test_gptq_version_1_is_read_as_it_was_meant_and_as_auto_round_reads_it(
    bits: int, group_size: int, sym: bool, tmp_path: Path
) -> None:
    scales, zeros, _, meant = levels(bits, group_size, sym)
    layer = packed_by(qlinear_torch_zp, bits, group_size, scales, zeros, meant, sym)
    ours = dequantize(parts_of(layer, tmp_path), PackingScheme(bits, group_size, "gptq"))
    assert ours.shape == (OUT, IN) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, meant.numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ours, layer(torch.eye(IN)).T.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("bits", "group_size", "sym"), GPTQ)
def test_gptq_version_2_is_read_as_it_was_meant_and_as_auto_round_reads_it(
    bits: int, group_size: int, sym: bool, tmp_path: Path
) -> None:
    scales, zeros, _, meant = levels(bits, group_size, sym, seed=1)
    layer = packed_by(qlinear_torch, bits, group_size, scales, zeros, meant, sym)
    ours = dequantize(parts_of(layer, tmp_path), PackingScheme(bits, group_size, "gptq_v2"))
    np.testing.assert_allclose(ours, meant.numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ours, layer(torch.eye(IN)).T.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_awq_is_read_as_it_was_meant_and_as_auto_round_reads_it(group_size: int, sym: bool, tmp_path: Path) -> None:
    scales, zeros, _, meant = levels(4, group_size, sym, seed=2)
    by_group = scales.t().contiguous()
    layer = WQLinear_GEMM.from_linear(
        linear_of(meant), 4, group_size, scales=by_group, zeros=8 if sym else zeros.t().contiguous(), device="cpu"
    )
    parts = parts_of(layer, tmp_path)
    ours = dequantize(parts, PackingScheme(4, group_size, "awq"))
    np.testing.assert_allclose(ours, meant.numpy(), rtol=1e-6, atol=1e-7)
    size = IN if group_size == -1 else group_size
    theirs = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, size)
    np.testing.assert_allclose(ours, theirs.T.float().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("bits", "stored", "zero"), [(2, 1, 2), (4, 7, 8), (8, 127, 128)])
def test_the_zero_point_trap_version_1_stores_the_zero_point_minus_one(
    bits: int, stored: int, zero: int, tmp_path: Path
) -> None:
    """Read as it is stored, every weight would be one scale too high."""
    scales, zeros, integers, meant = levels(bits, 32, True)
    layer = packed_by(qlinear_torch_zp, bits, 32, scales, zeros, meant, True)
    parts = parts_of(layer, tmp_path)
    assert set(unpack(to_torch(parts["qzeros"]), bits).flatten().tolist()) == {stored}
    right = dequantize(parts, PackingScheme(bits, 32, "gptq"))
    wrong = dequantize(parts, PackingScheme(bits, 32, "gptq_v2"))
    one_scale = scales.repeat_interleave(32, 1).numpy()
    np.testing.assert_allclose(wrong - right, one_scale, rtol=1e-3)
    np.testing.assert_array_equal(right[integers.numpy() == zero], 0.0)


@pytest.mark.parametrize("module", [qlinear_torch_zp, qlinear_torch])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_shapes_of_a_scheme_are_those_that_auto_round_makes(module: Any, bits: int) -> None:
    for group_size in (32, 64, 128, 256, -1):
        layer = module.QuantLinear(bits, group_size, IN, OUT, bias=False, g_idx=True)
        packing = "gptq" if module is qlinear_torch_zp else "gptq_v2"
        theirs = {k: tuple(v.shape) for k, v in layer.state_dict().items()}
        assert PackingScheme(bits, group_size, packing).shapes(OUT, IN) == {"g_idx": (IN,)} | theirs


def test_the_shapes_of_awq_are_those_that_auto_round_makes() -> None:
    for group_size in (32, 64, -1):
        layer = WQLinear_GEMM(4, group_size, IN, OUT, False, "cpu")
        expected = PackingScheme(4, group_size, "awq").shapes(OUT, IN)
        assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
            k: v for k, v in expected.items() if k != "g_idx"
        }


def test_a_group_size_that_does_not_divide_the_input_leaves_a_short_last_group(tmp_path: Path) -> None:
    scales, zeros, _, meant = levels(4, 128, False)
    layer = packed_by(qlinear_torch_zp, 4, 128, scales, zeros, meant, False)
    parts = parts_of(layer, tmp_path)
    assert parts["scales"].shape == (2, OUT)
    np.testing.assert_allclose(dequantize(parts, PackingScheme(4, 128)), meant.numpy(), rtol=1e-6, atol=1e-7)


def test_an_index_of_groups_decides_which_scale_a_row_has(tmp_path: Path) -> None:
    scales, zeros, _, meant = levels(4, 32, False)
    layer = packed_by(qlinear_torch_zp, 4, 32, scales, zeros, meant, False)
    save_file({**layer.state_dict()}, tmp_path / "plain.safetensors")
    plain = dequantize(read_header(tmp_path / "plain.safetensors"), PackingScheme(4, 32))
    group = torch.arange(IN, dtype=torch.int32) // 32
    save_file({**layer.state_dict(), "g_idx": group}, tmp_path / "same.safetensors")
    np.testing.assert_array_equal(dequantize(read_header(tmp_path / "same.safetensors"), PackingScheme(4, 32)), plain)
    save_file({**layer.state_dict(), "g_idx": group.flip(0).contiguous()}, tmp_path / "turned.safetensors")
    turned = dequantize(read_header(tmp_path / "turned.safetensors"), PackingScheme(4, 32))
    words = unpack(layer.qweight.T, 4).numpy()
    at, zero = scales[:, -1:].numpy(), zeros[:, -1:].numpy()
    np.testing.assert_allclose(turned[:, :32], (words[:, :32] - zero) * at, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacked_integers_are_those_that_were_packed(bits: int) -> None:
    _, _, integers, meant = levels(bits, 32, False, seed=3)
    scales, zeros, *_ = levels(bits, 32, False, seed=3)
    layer = packed_by(qlinear_torch, bits, 32, scales, zeros, meant, False)
    np.testing.assert_array_equal(unpack(layer.qweight.T, bits), integers)
    np.testing.assert_array_equal(unpack(layer.qzeros, bits).T, zeros)


def test_the_words_with_the_highest_bit_set_are_not_taken_for_negative() -> None:
    words = torch.full((8, 1), -1, dtype=torch.int32)
    np.testing.assert_array_equal(unpack(words, 4), np.full((8, 8), 15))
    np.testing.assert_array_equal(unpack(words.T, 8), np.full((1, 32), 255))
    np.testing.assert_array_equal(unpack(torch.full((1, 3), -1, dtype=torch.int32), 3), np.full((1, 32), 7))


def test_what_the_other_tests_pack_by_hand_is_read_as_it_was_meant(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    parts, meant = rounded(weight)
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(parts))
    ours = dequantize(read_header(tmp_path / "x.safetensors"), PackingScheme(4, 32))
    np.testing.assert_allclose(ours, meant, rtol=1e-6)
    assert np.abs(ours - weight).max() < 0.3


def test_bf16_is_widened_and_not_reinterpreted(tmp_path: Path) -> None:
    data = np.array([0x3F80, 0xC000, 0x0000, 0x7F7F], "<u2").tobytes()
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"t": ("BF16", (2, 2), data)}))
    array = to_numpy(read_header(tmp_path / "x.safetensors")["t"])
    np.testing.assert_array_equal(array, from_bf16(data, (2, 2)))
    assert array[0].tolist() == [1.0, -2.0]


def test_a_dtype_that_numpy_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"t": ("F8_E4M3", (2,), b"ab")}))
    with pytest.raises(CheckpointError, match="t has dtype F8_E4M3"):
        to_numpy(read_header(tmp_path / "x.safetensors")["t"])


def test_an_index_of_groups_beyond_the_last_one_is_a_checkpoint_error(tmp_path: Path) -> None:
    parts, _ = rounded(np.ones((16, 64), np.float32))
    parts["g_idx"] = ("I32", (64,), np.full(64, 9, "<i4").tobytes())
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(parts))
    with pytest.raises(CheckpointError):
        dequantize(read_header(tmp_path / "x.safetensors"), PackingScheme(4, 32))
