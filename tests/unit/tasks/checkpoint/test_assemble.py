"""assemble: packed parts from auto-round, everything else from the base, or an error that names the layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint import assemble as assembling
from requant.tasks.checkpoint.assemble import assemble, packed_parts
from requant.tasks.checkpoint.checkpoint import INDEX, Checkpoint
from requant.tasks.checkpoint.writer import split_into_shards
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import (
    all_tensors,
    file_from,
    quantization_config,
    raw_tensors,
    safetensors_bytes,
    write_packed,
)
from tests.factories.pico import pico_base

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]
MODULE = "model.language_model.layers.1.self_attn.q_proj"


@dataclass
class Parts:
    """A base, what auto-round made of it, and where the result goes."""

    base: Path
    packed: Path
    bits: dict[str, int]
    out: Path

    def assemble(self) -> list[Any]:
        return assemble(Checkpoint.open(self.base), Checkpoint.open(self.packed), self.bits, self.out)

    def edit(self, change: Callable[[Raw], Any]) -> None:
        """Change the tensors that auto-round wrote."""
        path = self.packed / "model.safetensors"
        tensors = raw_tensors(path)
        change(tensors)
        path.write_bytes(safetensors_bytes(tensors))

    def refused(self, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            self.assemble()
        assert not self.out.exists() or list(self.out.iterdir()) == []


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    base = pico_base(tmp_path / "base")
    return Parts(base, tmp_path / "packed", write_packed(base, tmp_path / "packed"), tmp_path / "out")


def test_packed_parts_come_from_auto_round_and_everything_else_verbatim_from_the_base(parts: Parts) -> None:
    parts.assemble()
    ours, base, theirs = all_tensors(parts.out), all_tensors(parts.base), all_tensors(parts.packed)
    modules = [m for m, b in parts.bits.items() if b < 16]
    expected = {
        n: raw for n, raw in base.items() if not n.startswith("mtp.") and n.removesuffix(".weight") not in modules
    }
    expected |= {f"{m}.{part}": theirs[f"{m}.{part}"] for m in modules for part in ("qweight", "qzeros", "scales")}
    assert ours == expected
    assert len(modules) == 13 and f"{MODULE}.qweight" in ours and f"{MODULE}.weight" not in ours


def test_the_files_are_described_as_they_lie_there(parts: Parts) -> None:
    files = parts.assemble()
    assert {f.path: f for f in files} == {p.name: file_from(p) for p in parts.out.iterdir()}
    assert {f.path for f in files} == {
        "model-00001-of-00001.safetensors", INDEX, "config.json", "quantization_config.json",
    }  # fmt: skip


def test_the_result_is_a_sound_checkpoint_whose_index_has_the_true_total_size(parts: Parts) -> None:
    parts.assemble()
    result = Checkpoint.open(parts.out)
    assert result.problems == []
    assert result.total_size == sum(len(data) for _, _, data in all_tensors(parts.out).values())


def test_large_checkpoints_are_split_as_the_index_says(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembling, "split_into_shards", lambda tensors: split_into_shards(tensors, 200_000))
    parts.assemble()
    shards = sorted(parts.out.glob("*.safetensors"))
    assert len(shards) > 2
    weight_map = json.loads((parts.out / INDEX).read_text())["weight_map"]
    assert {n: s.name for s in shards for n in raw_tensors(s)} == weight_map
    assert Checkpoint.open(parts.out).problems == []


def test_the_config_is_the_bases_and_the_quantization_config_besides(parts: Parts) -> None:
    parts.assemble()
    config = json.loads((parts.out / "config.json").read_text())
    assert config.pop("quantization_config") == quantization_config()
    assert config == json.loads((parts.base / "config.json").read_text())
    assert json.loads((parts.out / "quantization_config.json").read_text()) == quantization_config()


def test_what_auto_round_says_of_the_head_is_left_out(parts: Parts) -> None:
    full = {"bits": 16, "data_type": "fp"}
    extra = {".*mtp.*": full, "mtp.fc": full, "mtp": full, MODULE: {"bits": 4}}
    parts.bits = write_packed(parts.base, parts.packed, config=quantization_config(extra_config=extra))
    parts.assemble()
    for document in (json.loads((parts.out / "config.json").read_text())["quantization_config"],
                     json.loads((parts.out / "quantization_config.json").read_text())):  # fmt: skip
        assert document["extra_config"] == {MODULE: {"bits": 4}}


def test_a_head_that_auto_round_packed_is_left_out_and_not_an_error(parts: Parts) -> None:
    def pack_head(tensors: Raw) -> None:
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"mtp.fc.{part}"] = tensors[f"{MODULE}.{part}"]
        del tensors["mtp.fc.weight"]

    parts.edit(pack_head)
    parts.bits["mtp.fc"] = 4
    parts.assemble()
    assert not [n for n in all_tensors(parts.out) if "mtp" in n]


def test_the_same_inputs_give_the_same_bytes(parts: Parts, tmp_path: Path) -> None:
    first = parts.assemble()
    parts.out = tmp_path / "again"
    assert parts.assemble() == first


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_packed_part_is_refused_by_name(parts: Parts, part: str) -> None:
    parts.edit(lambda tensors: tensors.pop(f"{MODULE}.{part}"))
    parts.refused(rf"q_proj\.{part} is missing")


def test_a_layer_that_was_to_be_packed_and_is_not_is_refused_by_name(parts: Parts) -> None:
    parts.edit(lambda tensors: [tensors.pop(f"{MODULE}.{p}") for p in ("qweight", "qzeros", "scales")])
    parts.refused(r"q_proj was to be quantized and has no packed weight")


def test_a_layer_that_was_packed_and_was_not_to_be_is_refused_by_name(parts: Parts) -> None:
    parts.bits[MODULE] = 16
    parts.refused(r"q_proj has a packed weight and was not to be quantized")


def test_a_packed_module_that_the_base_does_not_have_is_refused_by_name(parts: Parts) -> None:
    def invent(tensors: Raw) -> None:
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"model.invented.{part}"] = tensors[f"{MODULE}.{part}"]

    parts.edit(invent)
    parts.bits["model.invented"] = 4
    parts.refused(r"the base has no matrix model\.invented\.weight")


def test_a_packed_module_whose_weight_is_no_matrix_is_refused(parts: Parts) -> None:
    module = "model.language_model.layers.0.linear_attn.conv1d"

    def pack(tensors: Raw) -> None:
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"{module}.{part}"] = tensors[f"{MODULE}.{part}"]

    parts.edit(pack)
    parts.bits[module] = 4
    parts.refused(r"the base has no matrix .*conv1d")


SHAPES = {
    "qweight": ("I32", (8, 64), bytes(2048)),
    "qzeros": ("I32", (2, 8), bytes(64)),
    "scales": ("F16", (1, 128), bytes(256)),
    "g_idx": ("I32", (32,), bytes(128)),
}


@pytest.mark.parametrize("part", SHAPES)
def test_packed_parts_of_the_wrong_shape_are_refused_by_name(parts: Parts, part: str) -> None:
    parts.edit(lambda tensors: tensors.update({f"{MODULE}.{part}": SHAPES[part]}))
    parts.refused(rf"q_proj\.{part} has shape .*its scheme needs")


def test_packed_parts_whose_sides_are_exchanged_are_refused(parts: Parts) -> None:
    def exchange(tensors: Raw) -> None:
        dtype, shape, data = tensors[f"{MODULE}.qweight"]
        tensors[f"{MODULE}.qweight"] = (dtype, shape[::-1], data)

    parts.edit(exchange)
    parts.refused(r"q_proj\.qweight has shape \(128, 8\)")


def test_packed_words_that_are_not_int32_are_refused(parts: Parts) -> None:
    def widen(tensors: Raw) -> None:
        _, shape, data = tensors[f"{MODULE}.qweight"]
        tensors[f"{MODULE}.qweight"] = ("I64", shape, data * 2)

    parts.edit(widen)
    parts.refused(r"q_proj\.qweight")


def test_a_layer_with_bits_of_its_own_must_have_the_shapes_of_those(parts: Parts) -> None:
    parts.bits = write_packed(parts.base, parts.packed, config=quantization_config(extra_config={MODULE: {"bits": 8}}))
    parts.refused(
        r"q_proj: its tensors hold 4 bits in groups of 32, and quantization_config says 8 bits in groups of 32"
    )


def test_an_index_of_groups_is_taken_along(parts: Parts) -> None:
    group = ("I32", (64,), b"".join(i.to_bytes(4, "little") for i in [0] * 32 + [1] * 32))
    parts.edit(lambda tensors: tensors.update({f"{MODULE}.g_idx": group}))
    parts.assemble()
    assert all_tensors(parts.out)[f"{MODULE}.g_idx"] == group


def test_nothing_quantized_at_all_is_refused(parts: Parts) -> None:
    parts.bits = dict.fromkeys(parts.bits, 16)
    parts.edit(lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith(("qweight", "qzeros", "scales"))])
    parts.refused("quantized no layer")


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": "int4"}], ids=repr)
def test_a_checkpoint_without_a_quantization_config_is_refused(parts: Parts, config: dict[str, Any]) -> None:
    (parts.packed / "config.json").write_text(json.dumps(config))
    parts.refused("no quantization_config")


def test_a_tensor_that_auto_round_alone_has_does_not_get_into_the_result(parts: Parts) -> None:
    parts.edit(lambda tensors: tensors.update({"extra.weight": ("F32", (1,), b"abcd")}))
    parts.assemble()
    assert "extra.weight" not in all_tensors(parts.out)


def test_a_tensor_that_auto_round_lost_or_changed_comes_from_the_base_all_the_same(parts: Parts) -> None:
    norm, embedding = "model.language_model.norm.weight", "model.language_model.embed_tokens.weight"

    def damage(tensors: Raw) -> None:
        del tensors[norm]
        dtype, shape, data = tensors[embedding]
        tensors[embedding] = (dtype, shape, bytes(len(data)))

    parts.edit(damage)
    parts.assemble()
    ours, base = all_tensors(parts.out), all_tensors(parts.base)
    assert ours[norm] == base[norm] and ours[embedding] == base[embedding]


def test_a_module_counts_as_packed_only_with_a_qweight(parts: Parts) -> None:
    tensors = Checkpoint.open(parts.packed).tensors.values()
    found = packed_parts(tensors)
    assert set(found) == {m for m, b in parts.bits.items() if b < 16}
    assert set(found[MODULE]) == {"qweight", "qzeros", "scales"}
    assert packed_parts([t for t in tensors if not t.name.endswith("qweight")]) == {}
