"""account finds whatever is not as in the base: the least flipped bit, the missing file, the invented tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.assemble import assemble
from requant.tasks.checkpoint.audit import Account, account
from requant.tasks.checkpoint.checkpoint import INDEX, Checkpoint
from requant.tasks.checkpoint.head import HEAD_SHARD, HeadFiles, keep_head, without_head
from tests.factories.checkpoints import all_tensors, edited, raw_tensors, write_checkpoint, write_packed
from tests.factories.paths import TINY
from tests.factories.pico import pico_base

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]
MAIN = "model-00001-of-00001.safetensors"
KEPT = "model.language_model.embed_tokens.weight"
MODULE = "model.language_model.layers.1.self_attn.q_proj"


@dataclass
class Pair:
    ours: Path
    base: Path

    def found(self, *, with_head: bool = True) -> Account:
        return account(Checkpoint.open(self.ours), Checkpoint.open(self.base), with_head=with_head)

    def edit(self, change: Callable[[Raw], Any], shard: str = MAIN) -> None:
        """Change tensors of ours, and the index so that it agrees."""
        with edited(self.ours, shard) as tensors:
            change(tensors)

    def edit_config(self, change: Callable[[dict[str, Any]], Any]) -> None:
        config = json.loads((self.ours / "config.json").read_text())
        change(config)
        (self.ours / "config.json").write_text(json.dumps(config))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A base, and what the pipeline makes of it."""
    base, ours = pico_base(tmp_path / "base"), tmp_path / "ours"
    bits = write_packed(base, tmp_path / "packed")
    source = Checkpoint.open(base)
    assemble(source, Checkpoint.open(tmp_path / "packed"), bits, ours)
    keep_head(HeadFiles.read(ours), source, ours)
    for path in TINY.iterdir():
        if not path.name.startswith("model") and path.name != "config.json":
            (ours / path.name).write_bytes(path.read_bytes())
    return Pair(ours, base)


def replaced(name: str, data: Callable[[bytes], bytes]) -> Callable[[Raw], None]:
    def change(tensors: Raw) -> None:
        dtype, shape, before = tensors[name]
        tensors[name] = (dtype, shape, data(before))

    return change


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_a_sound_checkpoint_is_accounted_for_to_the_last_tensor(pair: Pair) -> None:
    names = set(all_tensors(pair.base))
    head = {n for n in names if n.startswith("mtp.")}
    assert pair.found() == Account(packed=13, kept=len(names) - len(head) - 13, head=len(head))


def test_a_dropped_head_is_accounted_for_when_the_config_says_so(pair: Pair) -> None:
    without_head(HeadFiles.read(pair.ours), Checkpoint.open(pair.base).head).write(pair.ours)
    (pair.ours / HEAD_SHARD).unlink()
    index = json.loads((pair.ours / INDEX).read_text())
    index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != HEAD_SHARD}
    index["metadata"]["total_size"] = sum(len(d) for _, _, d in all_tensors(pair.ours).values())
    (pair.ours / INDEX).write_text(json.dumps(index))
    found = pair.found(with_head=False)
    assert (found.head, found.unaccounted, found.altered, found.files) == (0, [], [], [])
    assert len(pair.found(with_head=True).unaccounted) == 15 + 1  # every tensor, and the count in the config


def test_a_head_that_was_to_be_dropped_and_is_there_is_found(pair: Pair) -> None:
    def zero(config: dict[str, Any]) -> None:
        config["text_config"]["mtp_num_hidden_layers"] = 0

    pair.edit_config(zero)
    assert any("mtp." in sentence for sentence in pair.found(with_head=False).unaccounted)


@pytest.mark.parametrize("position", [0, 12345, -1])
def test_one_flipped_bit_in_a_kept_tensor_is_found_by_name(pair: Pair, position: int) -> None:
    size = len(raw_tensors(pair.ours / MAIN)[KEPT][2])
    pair.edit(replaced(KEPT, lambda data: flipped(data, position % size)))
    found = pair.found()
    assert found.altered == [f"{KEPT} differs from the base's"]
    assert (found.unaccounted, found.not_finite, found.files) == ([], [], [])


def test_one_flipped_bit_in_the_head_is_found_by_name(pair: Pair) -> None:
    pair.edit(replaced("mtp.fc.weight", lambda data: flipped(data, 7)), HEAD_SHARD)
    assert pair.found().altered == ["mtp.fc.weight differs from the base's"]


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF], ids=["inf", "-inf", "nan", "another nan"])
def test_a_kept_value_that_is_not_finite_is_found_and_told_from_one_that_the_base_has_too(
    pair: Pair, bits: int
) -> None:
    spoil = replaced(KEPT, lambda data: data[:-2] + struct.pack("<H", bits))
    pair.edit(spoil)
    found = pair.found()
    assert (found.not_finite, found.not_finite_in_base, len(found.altered)) == ([KEPT], [], 1)
    theirs = Pair(pair.base, pair.base)
    shard = next(s.name for s in pair.base.glob("*.safetensors") if KEPT in raw_tensors(s))
    theirs.edit(spoil, shard)
    found = pair.found()
    assert (found.not_finite, found.altered) == ([], [])
    assert found.not_finite_in_base == [f"{KEPT} is not finite in the base either"]


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00], ids=["inf", "-inf", "nan"])
def test_a_packed_scale_that_is_not_finite_is_found_by_name(pair: Pair, bits: int) -> None:
    pair.edit(replaced(f"{MODULE}.scales", lambda data: data[:2] + struct.pack("<H", bits) + data[4:]))
    found = pair.found()
    assert (found.not_finite, found.altered, found.unaccounted) == ([f"{MODULE}.scales"], [], [])


def test_the_largest_finite_value_is_finite(pair: Pair) -> None:
    pair.edit(replaced(f"{MODULE}.scales", lambda data: struct.pack("<H", 0x7BFF) + data[2:]))
    assert pair.found().not_finite == []


@pytest.mark.parametrize("name", [KEPT, "lm_head.weight", "model.visual.merger.norm.bias"])
def test_a_missing_tensor_is_found_by_name(pair: Pair, name: str) -> None:
    pair.edit(lambda tensors: tensors.pop(name))
    assert pair.found().unaccounted == [f"{name} of the base is missing"]


def test_a_missing_head_is_found_unless_it_was_to_be_dropped(pair: Pair) -> None:
    pair.edit(lambda tensors: tensors.pop("mtp.norm.weight"), HEAD_SHARD)
    assert pair.found().unaccounted == ["mtp.norm.weight of the base is missing"]


def test_an_extra_tensor_is_found_by_name(pair: Pair) -> None:
    pair.edit(lambda tensors: tensors.update({"model.adapter.weight": ("BF16", (1,), b"ab")}))
    assert pair.found().unaccounted == ["model.adapter.weight is not in the base"]


def test_packed_parts_beside_the_weight_they_stand_for_are_found(pair: Pair) -> None:
    weight = all_tensors(pair.base)[f"{MODULE}.weight"]
    pair.edit(lambda tensors: tensors.update({f"{MODULE}.weight": weight}))
    assert sorted(pair.found().unaccounted) == [
        f"{MODULE}.{p} is not in the base" for p in ("qweight", "qzeros", "scales")
    ]


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_packed_part_is_found_by_name(pair: Pair, part: str) -> None:
    pair.edit(lambda tensors: tensors.pop(f"{MODULE}.{part}"))
    assert pair.found().unaccounted == [f"{MODULE}.{part} is missing beside {MODULE}.qweight"]


def test_a_packed_part_of_another_shape_is_found_by_name(pair: Pair) -> None:
    pair.edit(lambda tensors: tensors.update({f"{MODULE}.qweight": ("I32", (4, 128), bytes(2048))}))
    assert pair.found().unaccounted == [f"{MODULE}.qweight has shape (4, 128), its scheme needs (8, 128)"]


def test_packed_words_of_another_type_are_found_by_name(pair: Pair) -> None:
    def retype(tensors: Raw) -> None:
        _, shape, data = tensors[f"{MODULE}.qweight"]
        tensors[f"{MODULE}.qweight"] = ("F32", shape, data)

    pair.edit(retype)
    found = pair.found()
    assert any(f"{MODULE}.qweight" in sentence for sentence in found.unaccounted + found.altered)


def test_a_retyped_tensor_is_found_with_both_types(pair: Pair) -> None:
    def retype(tensors: Raw) -> None:
        _, shape, data = tensors[KEPT]
        tensors[KEPT] = ("F16", shape, data)

    pair.edit(retype)
    assert pair.found().altered == [f"{KEPT} is F16 (2048, 64), in the base BF16 (2048, 64)"]


def test_a_reshaped_tensor_is_found(pair: Pair) -> None:
    def reshape(tensors: Raw) -> None:
        dtype, _, data = tensors[KEPT]
        tensors[KEPT] = (dtype, (64, 2048), data)

    pair.edit(reshape)
    assert pair.found().altered == [f"{KEPT} is BF16 (64, 2048), in the base BF16 (2048, 64)"]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "model_type": lambda config: config.update(model_type="llama"),
    "added": lambda config: config.update(added=1),
    "text_config": lambda config: config["text_config"].update(rms_norm_eps=1e-5),
    "vision_config": lambda config: config.pop("vision_config"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_config_field_is_found_by_name(pair: Pair, key: str) -> None:
    pair.edit_config(CHANGES[key])
    assert pair.found().unaccounted == [f"config.json differs from the base's in {key}"]


CHOOSE = "engines choose by it what they compute in"
DTYPES: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "another": (
        lambda config: config.update(dtype="float16"),
        [f"config.json says dtype float16, the base's bfloat16: {CHOOSE}"],
    ),
    "under its earlier name": (
        lambda config: config.update(torch_dtype=config.pop("dtype").replace("b", "", 1)),
        [f"config.json says dtype float16, the base's bfloat16: {CHOOSE}"],
    ),
    "in a part": (
        lambda config: config["text_config"].update(dtype="float32"),
        [f"config.json says text_config.dtype float32, the base's bfloat16: {CHOOSE}"],
    ),
    "none": (
        lambda config: config["text_config"].pop("dtype"),
        [f"config.json says no text_config.dtype, the base's bfloat16: {CHOOSE}"],
    ),
    "the same under its earlier name": (
        lambda config: config.update(torch_dtype=config.pop("dtype")),
        [
            f"config.json differs from the base's in {name}, which changes nothing that is computed"
            for name in ("dtype", "torch_dtype")
        ],
    ),
}


@pytest.mark.parametrize("case", DTYPES)
def test_another_dtype_is_a_finding_that_says_what_it_does(pair: Pair, case: str) -> None:
    change, differences = DTYPES[case]
    pair.edit_config(change)
    found = pair.found()
    assert found.differences == differences and found.unaccounted == []


@pytest.mark.parametrize(
    ("path", "key"),
    [("tokenizer_config.json", "tokenizer_class"), ("preprocessor_config.json", "processor_class")],
)
def test_another_class_of_the_tokenizer_or_processor_is_no_bookkeeping(pair: Pair, path: str, key: str) -> None:
    """It decides what is loaded."""
    for folder, name in ((pair.base, "One"), (pair.ours, "Other")):
        document = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps({**document, key: name}))
    found = pair.found()
    assert found.files == [f"{path} differs from the base's"] and found.differences == []


def test_a_changed_tokenizer_file_is_found_by_name(pair: Pair) -> None:
    path = pair.ours / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert pair.found().files == ["tokenizer.json differs from the base's"]


def test_a_missing_processor_file_is_found_by_name(pair: Pair) -> None:
    (pair.ours / "video_preprocessor_config.json").unlink()
    assert pair.found().files == ["video_preprocessor_config.json of the base is missing"]


def test_a_missing_file_in_a_subfolder_is_found_by_name(pair: Pair) -> None:
    (pair.base / "extra").mkdir()
    (pair.base / "extra" / "chat.jinja").write_text("x")
    assert pair.found().files == ["extra/chat.jinja of the base is missing"]


def test_the_card_and_the_hubs_own_file_may_differ(pair: Pair) -> None:
    (pair.base / "README.md").write_text("theirs")
    (pair.base / ".gitattributes").write_text("theirs")
    (pair.ours / "README.md").write_text("ours")
    assert pair.found().files == []


def test_a_checkpoint_in_which_nothing_is_quantized_is_found(pair: Pair) -> None:
    assert Pair(pair.base, pair.base).found().unaccounted == ["no tensor is quantized"]


def test_a_scheme_that_is_not_known_is_found_for_every_layer(pair: Pair) -> None:
    pair.edit_config(lambda config: config["quantization_config"].update(packing_format="marlin"))
    found = pair.found().unaccounted
    assert len(found) == 13 and all("'marlin'" in sentence for sentence in found)


def test_the_problems_of_a_checkpoint_are_unaccounted(pair: Pair) -> None:
    (pair.ours / HEAD_SHARD).unlink()
    found = pair.found().unaccounted
    assert found[0].startswith(f"the index names {HEAD_SHARD}, which is missing")
    assert len(found) == 1 + 15


def test_a_tensor_of_many_chunks_is_compared_to_its_end(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from requant.tasks.checkpoint import header

    monkeypatch.setattr(header, "CHUNK_BYTES", 1000)
    assert pair.found().altered == []
    pair.edit(replaced(KEPT, lambda data: flipped(data, len(data) - 2)))
    assert pair.found().altered == [f"{KEPT} differs from the base's"]


def test_an_empty_tensor_is_kept_like_any_other(tmp_path: Path) -> None:
    shards = {"model-00001-of-00001.safetensors": {"a": ("BF16", (0, 4), b"")}}
    write_checkpoint(tmp_path / "one", shards, {})
    write_checkpoint(tmp_path / "two", shards, {})
    found = Pair(tmp_path / "one", tmp_path / "two").found()
    assert (found.kept, found.altered, found.not_finite) == (1, [], [])
