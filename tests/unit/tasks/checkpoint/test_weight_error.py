"""How far packed matrices are from the base's, against plain numpy on matrices whose rounding is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from requant.tasks.checkpoint import dequantize, weight_error
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.fp8 import write_dequantized
from requant.tasks.checkpoint.weight_error import Fidelity, fidelity
from requant.tasks.validating.gates import slope_error
from requant.tasks.validating.measured import MatrixError
from tests.factories.checkpoints import all_tensors, from_bf16, rounded, write_quantized
from tests.factories.damage import Edit
from tests.factories.fp8_bases import as_fp8
from tests.factories.pico import pico_base

MODULE = "model.language_model.layers.1.mlp.up_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_base(tmp_path / "base", seed=1)


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Path:
    return write_quantized(base, tmp_path / "quantized")


def of(made: Path, base: Path, module: str = MODULE) -> Fidelity:
    found = {matrix.name: matrix for matrix in fidelity(Checkpoint.open(made), Checkpoint.open(base))}
    return found[f"{module}.weight"]


def test_every_packed_matrix_is_compared(base: Path, made: Path) -> None:
    found = fidelity(Checkpoint.open(made), Checkpoint.open(base), free_bytes=1 << 40)
    packed = [name.removesuffix(".qweight") for name in all_tensors(made) if name.endswith(".qweight")]
    assert sorted(matrix.name for matrix in found) == sorted(f"{module}.weight" for module in packed)
    assert {matrix.bits for matrix in found} == {4}


def test_the_figures_are_those_of_their_formulas(base: Path, made: Path) -> None:
    _, shape, data = all_tensors(base)[f"{MODULE}.weight"]
    weight = from_bf16(data, shape).astype(np.float64)
    parts, meant = rounded(from_bf16(data, shape))
    scale = np.frombuffer(parts["scales"][2], "<f2").reshape(parts["scales"][1]).astype(np.float64).T
    steps = (meant - weight).reshape(*scale.shape, -1).mean(-1) / scale
    found = of(made, base)
    assert found.slope == pytest.approx((meant * weight).sum() / (weight**2).sum(), rel=1e-5)
    assert found.offset == pytest.approx(steps.mean(), abs=1e-5)
    assert found.error == pytest.approx(np.linalg.norm(meant - weight) / np.linalg.norm(weight), rel=1e-5)
    assert 0.98 < found.slope < 1.02 and abs(found.offset) < 0.05 and 0.05 < found.error < 0.15


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_scales_that_are_off_show_in_the_slope_and_hardly_in_the_error(base: Path, made: Path, factor: float) -> None:
    before = of(made, base)
    edit = Edit(made)
    edit.change(f"{MODULE}.scales", "<f2", lambda scales: scales.astype(np.float32) * factor)
    edit.write()
    after = of(made, base)
    assert after.slope == pytest.approx(factor * before.slope, abs=1e-3)
    assert after.error < before.error + 0.03
    assert before.scale_factor == pytest.approx(1, abs=0.01) and after.scale_factor == pytest.approx(factor, abs=0.01)


@pytest.mark.parametrize(("change", "offset"), [(0x11111111, -1), (-0x11111111, 1)])
def test_zero_points_that_are_off_by_one_show_as_a_whole_step(base: Path, made: Path, change: int, offset: int) -> None:
    edit = Edit(made)
    edit.change(f"{MODULE}.qzeros", "<u4", lambda words: (words.astype(np.int64) + change).astype(np.uint32))
    edit.write()
    assert of(made, base).offset == pytest.approx(offset, abs=0.05)


def test_a_base_in_fp8_counts_as_the_bf16_that_quantize_reads_of_it(base: Path, tmp_path: Path) -> None:
    fp8 = Checkpoint.open(as_fp8(base, tmp_path / "fp8"))
    plain = write_dequantized(fp8, tmp_path / "plain")
    made = Checkpoint.open(write_quantized(plain, tmp_path / "of fp8"))
    found = fidelity(made, fp8)
    assert found == fidelity(made, Checkpoint.open(plain)) and len(found) == 13
    assert found != fidelity(made, Checkpoint.open(base))


def test_the_height_of_stripes_and_the_order_of_groups_change_no_figure(
    base: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups in another order are looked up, which says the same of those that are in order."""
    before = of(made, base)
    monkeypatch.setitem(dequantize.STRIPE_WEIGHTS, "cpu", 1)
    monkeypatch.setattr(weight_error, "group_of_inputs", lambda matrix, device: torch.from_numpy(matrix.group))
    after = of(made, base)
    assert (after.name, after.bits) == (before.name, before.bits)
    for figure in ("slope", "offset", "error", "slope_excess", "scale_factor", "rounding_noise"):
        assert getattr(after, figure) == pytest.approx(getattr(before, figure), rel=1e-5, abs=1e-7)


def test_another_matrix_has_no_slope(base: Path, made: Path) -> None:
    edit = Edit(made)
    edit[f"{MODULE}.qweight"] = edit[f"{MODULE.replace('up', 'gate')}.qweight"]
    edit.write()
    found = of(made, base)
    assert abs(found.slope) < 0.1 and found.error > 1.2
    assert found.slope_excess < -0.8


def test_a_matrix_of_zeros_is_compared_too(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", seed=1)
    edit = Edit(base)
    dtype, shape, data = edit[f"{MODULE}.weight"]
    edit[f"{MODULE}.weight"] = (dtype, shape, bytes(len(data)))
    edit.write()
    assert of(write_quantized(base, tmp_path), base) == Fidelity(f"{MODULE}.weight", 4, 1.0, 0.0, 0.0)


def test_a_matrix_of_zeros_of_which_something_else_was_made_raises_an_alarm(made: Path, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", seed=1)
    edit = Edit(base)
    dtype, shape, data = edit[f"{MODULE}.weight"]
    edit[f"{MODULE}.weight"] = (dtype, shape, bytes(len(data)))
    edit.write()
    found = of(made, base)
    assert (found.slope, found.error) == (0.0, 1.0)
    assert slope_error(MatrixError(**vars(found))) == 1.0
