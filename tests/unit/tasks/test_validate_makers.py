"""Checkpoints of other people's quantizers: everything is measured of each, and the figures are those of its bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.compare import compare_checkpoints
from requant.tasks.recipe.recipe import Gates
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validate import measured_values
from requant.tasks.validating.document import ValidationDocument
from requant.tasks.validating.gates import Gate
from requant.tasks.validating.measure import measure, run_settings
from requant.tasks.validating.measured import Measured
from requant.tasks.validating.measurement import Measurement
from requant.tasks.validating.model import RunSettings
from tests.factories.checkpoints import from_bf16, raw_tensors, safetensors_bytes, to_bf16
from tests.factories.makers import KINDS, made_by_others
from tests.factories.measured import measuring_little
from tests.factories.pico import pico_llama

SHARD = "model.safetensors"
NONE = Gates(**dict.fromkeys(Gates.model_fields))
# The largest |Q - W| / |W| of a matrix, by the bits of its codes. Weights of the base are normal.
ERRORS = {3: 0.30, 4: 0.16, 8: 0.04}
ROUNDS_INPUTS = {"w8a8": 8, "fp8-dynamic": 8, "fp8-block": 8, "nvfp4": 4, "auto-round-nvfp4": 4, "auto-round-mxfp4": 4,
                 "auto-round-fp8": 8}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with measuring_little(windows=2, length=64, probe=32, prompts=1, generated=4, longest=64):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def of_base(base: Path) -> Measurement:
    return measure(base, EVALUATION, RunSettings(torch.device("cpu"), torch.float32))


def values_of(folder: Path, base: Path, of_base: Measurement) -> Measured:
    def measure_one(path: Path, settings: RunSettings) -> Measurement:
        return of_base if path == base else measure(path, EVALUATION, settings)

    checkpoint, settings = Checkpoint.open(folder), run_settings(base)
    return measured_values(
        checkpoint, Checkpoint.open(base).sound(), measure_one, keep_head=False, pack_head=False, settings=settings
    )


def gates_of(measured: Measured, limits: Gates = NONE) -> dict[str, Gate]:
    return {gate.name: gate for gate in ValidationDocument.of(measured, limits).gates}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_measured_of_a_checkpoint_that_others_made(
    kind: str, base: Path, of_base: Measurement, tmp_path: Path
) -> None:
    measured = values_of(made_by_others(kind, base, tmp_path / kind), base, of_base)
    gates = gates_of(measured)
    assert [gate for gate in gates.values() if gate.value is None] == []
    assert {gate.result for gate in gates.values()} == {"passed", "measured"}, gates
    assert measured.audit.packed == 7 and measured.audit.unaccounted == measured.audit.altered == ()
    assert measured.matrices is not None and len(measured.matrices) == 7
    for matrix in measured.matrices:
        assert 0 < matrix.error < ERRORS[matrix.bits], (kind, matrix)
        assert abs(matrix.offset) < 0.1, (kind, matrix)
    assert gates["weight_slope"].value is not None and gates["weight_slope"].value < 0.03
    divergence = measured.divergence.kl_divergence
    assert divergence is not None and 0 < divergence < 0.3
    findings = ValidationDocument.of(measured, NONE).findings
    told = [finding for finding in findings if "round the inputs" in finding]
    assert [f"to {ROUNDS_INPUTS[kind]} bits" in sentence for sentence in told] == [True] * (kind in ROUNDS_INPUTS)


SCALED = {
    "w4a16": "weight_scale",
    "w8a8": "weight_scale",
    "fp8-dynamic": "weight_scale",
    "nvfp4": "weight_global_scale",
}
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
LAYER = "model.layers.0.mlp.up_proj"


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = raw_tensors(folder / SHARD)
    change(tensors)
    (folder / SHARD).write_bytes(safetensors_bytes(tensors))


def reconfigure(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def multiply(tensors: Tensors, name: str, factor: float) -> None:
    dtype, shape, data = tensors[name]
    if dtype == "BF16":
        tensors[name] = (dtype, shape, to_bf16(from_bf16(data, shape) * np.float32(factor)))
    else:
        tensors[name] = (dtype, shape, (np.frombuffer(data, "<f4") * np.float32(factor)).tobytes())


@pytest.mark.parametrize("kind", SCALED)
def test_scales_that_are_wrong_fail_the_slope_whatever_the_format(
    kind: str, base: Path, of_base: Measurement, tmp_path: Path
) -> None:
    folder = made_by_others(kind, base, tmp_path / kind)
    edit(folder, lambda tensors: multiply(tensors, f"{LAYER}.{SCALED[kind]}", 1.1))
    gate = gates_of(values_of(folder, base, of_base), Gates())["weight_slope"]
    assert gate.failed and gate.note == f"{LAYER}.weight"


def nan_scale(folder: Path) -> None:
    edit(folder, lambda tensors: multiply(tensors, f"{LAYER}.weight_scale", float("nan")))


def two_scales(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({f"{LAYER}.weight_scale": ("F32", (3, 5), bytes(60))}))


def quantization(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: reconfigure(folder, lambda config: change(config["quantization_config"]))


def tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, change)


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    (group,) = config["config_groups"].values()
    weights: dict[str, Any] = group["weights"]
    return weights


def key_twice(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text('{"model_type": "llama",' + path.read_text()[1:])


def cut_off(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


ROTATED = {"config_groups": {"u": {}}}
NORM = "model.norm.weight"
# What is wrong, and the reason that is told where nothing can be run; none where everything is measured all the same.
WRONG: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "another width in the config": (quantization(lambda config: weights_of(config).update(num_bits=8)), None),
    "no config of the quantization": (lambda f: reconfigure(f, lambda config: config.pop("quantization_config")), None),
    "a key twice": (key_twice, None),
    "a scale of the cache": (tensors(lambda t: t.update({"model.layers.0.self_attn.k_scale": t[NORM]})), None),
    "a scale is missing": (tensors(lambda t: t.pop(f"{LAYER}.weight_scale")), "weight_scale is missing"),
    "scales of another matrix": (two_scales, "does not fit"),
    "its shape is missing": (tensors(lambda t: t.pop(f"{LAYER}.weight_shape")), "weight_shape"),
    "a norm is missing": (tensors(lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "a method of other names": (quantization(lambda config: config.update(quant_method="eetq")), "lacks model."),
    "cut off": (cut_off, "download the file again"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_only_what_cannot_be_loaded_is_not_measured_and_nothing_wrong_passes(
    wrong: str, base: Path, of_base: Measurement, tmp_path: Path
) -> None:
    folder = made_by_others("w4a16", base, tmp_path / "made")
    damage, reason = WRONG[wrong]
    damage(folder)
    measured = values_of(folder, base, of_base)
    for limits in (NONE, Gates()):
        document = ValidationDocument.of(measured, limits)
        gates = {gate.name: gate for gate in document.gates}
        assert not document.passed and gates["structure"].failed
        unmeasured = [gate for gate in gates.values() if gate.value is None]
        assert all(gate.result in ("not measured", "failed") for gate in unmeasured)
        assert bool(unmeasured) == (reason is not None), unmeasured
        assert reason is None or sum(reason in gate.note for gate in unmeasured) == 1


def test_a_scale_that_is_no_number_is_found_and_measured(base: Path, of_base: Measurement, tmp_path: Path) -> None:
    folder = made_by_others("w4a16", base, tmp_path / "made")
    nan_scale(folder)
    gates = gates_of(values_of(folder, base, of_base), Gates())
    assert gates["finite"].note == f"{LAYER}.weight_scale" and gates["structure"].passed
    assert gates["kl_divergence"].failed and gates["weight_slope"].failed


def test_a_format_without_a_formula_is_loaded_by_transformers_and_its_weights_are_not_compared(
    base: Path, of_base: Measurement, tmp_path: Path
) -> None:
    """BitNet: transformers 5.23.0 computes it without another library, quantizers/quantizer_bitnet.py."""
    with torch.compiler.set_stance("force_eager"):
        measured = values_of(ternary(base, tmp_path / "ternary"), base, of_base)
    gates = gates_of(measured)
    assert {gate.name for gate in gates.values() if gate.value is None} == {"weight_slope", "weight_offset"}
    assert "can be dequantized" in gates["weight_slope"].note and gates["weight_slope"].result == "not measured"
    assert "7 matrices are not compared with the base's" in gates["structure"].note and gates["structure"].passed
    assert 0.3 < (gates["block_error"].value or 0) < 1.5, "three values for each weight"


def ternary(base: Path, folder: Path) -> Path:
    """A checkpoint of BitNet: weights -1, 0 and 1, four in a byte, times 1 / weight_scale."""
    pico_llama(folder)
    tensors: Tensors = {}
    for name, (dtype, shape, data) in raw_tensors(base / SHARD).items():
        if "_proj." not in name:
            tensors[name] = (dtype, shape, data)
            continue
        weight = from_bf16(data, shape)
        scale = np.abs(weight).mean()
        codes = np.clip(np.rint(weight / scale), -1, 1).astype(np.uint8) + np.uint8(1)
        rows = shape[0] // 4
        packed = sum(codes[part * rows :][:rows] << 2 * part for part in range(4)).astype(np.uint8)
        tensors[name] = ("U8", packed.shape, packed.tobytes())
        tensors[f"{name}_scale"] = ("BF16", (1,), to_bf16(np.array([1 / scale])))
    (folder / SHARD).write_bytes(safetensors_bytes(tensors))
    bitnet = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
    reconfigure(folder, lambda config: config.update(quantization_config=bitnet))
    return folder


@pytest.mark.parametrize(
    "config", [{"transform_config": ROTATED}, {"quant_method": "torchao"}], ids=["rotated", "torchao"]
)
def test_what_neither_a_formula_nor_transformers_can_load_is_not_measured_and_not_called_broken(
    config: dict[str, Any], base: Path, of_base: Measurement, tmp_path: Path
) -> None:
    folder = made_by_others("w8a8", base, tmp_path / "made")
    quantization(lambda whole: whole.update(config))(folder)
    document = ValidationDocument.of(values_of(folder, base, of_base), NONE)
    gates = {gate.name: gate for gate in document.gates}
    assert gates["structure"].passed and not document.passed
    assert gates["kl_divergence"].result == "not measured"
    assert "transformers cannot load it here" in gates["weight_slope"].note


def test_two_checkpoints_of_others_are_compared(base: Path, tmp_path: Path) -> None:
    four, eight = (made_by_others(kind, base, tmp_path / kind) for kind in ("nvfp4", "w8a8"))
    (eight / "tokenizer.json").unlink()
    (domain,) = compare_checkpoints(four, eight, base, EVALUATION).values()
    assert domain.kl_divergence.difference < -0.5, "8 bits are closer to the base"
