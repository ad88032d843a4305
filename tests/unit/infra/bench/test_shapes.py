"""The benchmark's 27B-shaped checkpoints: of the published size, sound, and next to nothing on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infra.bench.shapes import (
    EXTRA,
    TINY,
    VIDEO,
    Dimensions,
    Vision,
    base_config,
    base_tensors,
    is_head,
    quantized_tensors,
    write_base,
    write_quantized,
)
from requant.tasks.checkpoint.checkpoint import INDEX, WRONG_TOTAL, Checkpoint
from requant.tasks.checkpoint.packing import PackingScheme, check_parts, to_numpy
from tests.factories.dequantized import dequantize

TINY_DIMENSIONS = Dimensions(
    layers=4,
    hidden=128,
    intermediate=384,
    heads=2,
    kv_heads=2,
    head_dim=64,
    linear_key_heads=2,
    linear_value_heads=2,
    linear_head_dim=64,
    vocab=2048,
    vision=Vision(depth=2, width=64, intermediate=128, heads=2, positions=64),
)


def on_disk(folder: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in folder.iterdir())


def test_with_the_tiny_models_dimensions_the_tensors_are_the_tiny_models() -> None:
    ours = base_tensors(TINY_DIMENSIONS)
    theirs = Checkpoint.open(TINY)
    assert {n: (s.dtype, s.shape) for n, s in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.tensors.items()
    }
    config = base_config(TINY_DIMENSIONS)
    config["text_config"] |= {"max_position_embeddings": 4096}
    config["text_config"]["rope_parameters"] |= {"rope_theta": 10000.0}
    assert config == theirs.config


def test_the_base_has_the_published_size_and_is_sound(tmp_path: Path) -> None:
    base = Checkpoint.open(write_base(tmp_path / "base", data=False))
    assert base.problems == []
    assert len(base.tensors) == 1199 and base.nbytes == base.total_size == 55_562_855_904
    assert len(base.shards) == 13 and all((base.folder / s).stat().st_size < 5e9 for s in base.shards)
    assert base.head is not None and base.head.layout == "mtp" and len(base.head.names) == 15
    assert list(base.tensors)[-1].startswith("mtp.")
    assert {base.tensors[name].path.name for name in base.head.names} == {base.shards[-1]}
    assert on_disk(base.folder) < 5_000_000


def test_the_quantized_one_is_as_auto_round_leaves_it(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "quantized", data=False)
    quantized = Checkpoint.open(folder)
    assert [p.startswith(WRONG_TOTAL) for p in quantized.problems] == [True]  # the head is not counted
    assert len(quantized.tensors) == 2013 - 1 + 3 and 18.5e9 < quantized.nbytes < 19.5e9
    assert quantized.head is not None and "mtp.fc.qweight" in quantized.head.names
    assert {quantized.tensors[name].path.name for name in quantized.head.names} == {EXTRA}
    assert {n for n, t in quantized.tensors.items() if t.path.name == EXTRA} == set(quantized.head.names)
    inside = quantized.config["quantization_config"]
    beside = json.loads((folder / "quantization_config.json").read_text())
    assert inside["block_name_to_quantize"] == ["model.language_model.layers", "mtp.layers"]
    assert {k for k in inside if inside[k] != beside[k]} == {"block_name_to_quantize"}
    assert len(inside["extra_config"]) == 2 * 48 and not (folder / VIDEO).exists()
    assert on_disk(folder) < 5_000_000


def test_the_quantized_one_with_a_true_total_has_no_problems(tmp_path: Path) -> None:
    quantized = Checkpoint.open(write_quantized(tmp_path / "quantized", data=False, stale_total=False))
    assert quantized.problems == [] and quantized.total_size == quantized.nbytes


def test_every_tensor_of_the_base_is_kept_or_packed_with_its_schemes_shapes(tmp_path: Path) -> None:
    quantized = Checkpoint.open(write_quantized(tmp_path / "quantized", data=False))
    seen: set[str] = set()
    for name, spec in base_tensors().items():
        module = name.removesuffix(".weight")
        parts = {p: quantized.tensors[f"{module}.{p}"] for p in ("qweight", "qzeros", "scales")
                 if f"{module}.{p}" in quantized.tensors}  # fmt: skip
        if parts:
            assert check_parts(module, parts, PackingScheme(4, 128), spec.shape) is None
            seen |= {tensor.name for tensor in parts.values()}
        else:
            assert quantized.tensors[name].shape == spec.shape
            seen.add(name)
    assert seen == set(quantized.tensors)


def test_the_heads_data_is_the_same_in_both_up_to_rounding(tmp_path: Path) -> None:
    base = Checkpoint.open(write_base(tmp_path / "base", TINY_DIMENSIONS))
    quantized = Checkpoint.open(write_quantized(tmp_path / "quantized", TINY_DIMENSIONS))
    for module in ("mtp.fc", "mtp.layers.0.mlp.down_proj"):
        weight = to_numpy(base.tensors[f"{module}.weight"])
        parts = {p: quantized.tensors[f"{module}.{p}"] for p in ("qweight", "qzeros", "scales")}
        error = np.linalg.norm(dequantize(parts, PackingScheme(4, 128)) - weight) / np.linalg.norm(weight)
        assert weight.std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05) and 0.08 < error < 0.15
    assert base.tensors["mtp.norm.weight"].read() == quantized.tensors["mtp.norm.weight"].read() != bytes(256)
    assert not any(base.tensors["lm_head.weight"].read())


def test_a_model_without_a_head_has_no_mtp_tensors() -> None:
    dims = Dimensions(mtp_layers=0)
    assert not any(is_head(name) for name in (*base_tensors(dims), *quantized_tensors(dims)))


def test_the_index_of_the_base_names_every_tensor_once(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", TINY_DIMENSIONS, data=False, max_shard=1_000_000)
    index = json.loads((folder / INDEX).read_text())
    assert set(index["weight_map"]) == set(base_tensors(TINY_DIMENSIONS))
    assert set(index["weight_map"].values()) == {p.name for p in folder.glob("*.safetensors")}
