"""The head goes in bit for bit, or out; shard, index and both configs agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.assemble import assemble
from requant.tasks.checkpoint.checkpoint import INDEX, Checkpoint
from requant.tasks.checkpoint.head import HEAD_SHARD, HeadFiles, check_head, keep_head, shards_with_head, without_head
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import (
    FULL,
    NARROW,
    all_tensors,
    file_from,
    quantization_config,
    raw_tensors,
    write_checkpoint,
    write_packed,
)
from tests.factories.pico import pico_base

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def quantized(base: Path, tmp_path: Path) -> Path:
    """The base quantized, without its head."""
    bits = write_packed(base, tmp_path / "packed")
    assemble(Checkpoint.open(base), Checkpoint.open(tmp_path / "packed"), bits, tmp_path / "quantized")
    return tmp_path / "quantized"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def kept(quantized: Path, base: Path) -> Path:
    """The quantized folder with the head put in."""
    keep_head(HeadFiles.read(quantized), Checkpoint.open(base), quantized)
    return quantized


def test_the_head_is_kept_bit_for_bit_in_a_shard_of_its_own(quantized: Path, base: Path) -> None:
    before = all_tensors(quantized)
    kept(quantized, base)
    head = {n: raw for n, raw in all_tensors(base).items() if n.startswith("mtp.")}
    assert len(head) == 15
    assert raw_tensors(quantized / HEAD_SHARD) == head
    assert all_tensors(quantized) == before | head


def test_the_result_is_sound_and_its_index_exact(quantized: Path, base: Path) -> None:
    kept(quantized, base)
    tensors = all_tensors(quantized)
    index = read(quantized / INDEX)
    assert index["metadata"] == {"total_size": sum(len(data) for _, _, data in tensors.values())}
    assert index["weight_map"] == {n: HEAD_SHARD if n.startswith("mtp.") else SHARD for n in tensors}
    checkpoint = Checkpoint.open(quantized)
    assert checkpoint.problems == [] and checkpoint.head is not None and len(checkpoint.head.names) == 15


def test_both_configs_say_that_the_head_is_not_quantized(quantized: Path, base: Path) -> None:
    kept(quantized, base)
    config = read(quantized / "config.json")
    modules = {n.removesuffix(".weight") for n in all_tensors(base) if n.startswith("mtp.") and "norm" not in n}
    assert len(modules) == 8
    expected = quantization_config(extra_config=NARROW | dict.fromkeys((".*mtp.*", *modules), FULL))
    assert config.pop("quantization_config") == expected == read(quantized / "quantization_config.json")
    assert config == read(base / "config.json")


def test_only_four_files_are_written_and_described_as_they_lie_there(
    quantized: Path, base: Path, tmp_path: Path
) -> None:
    files = keep_head(HeadFiles.read(quantized), Checkpoint.open(base), tmp_path / "out")
    assert {f.path: f for f in files} == {p.name: file_from(p) for p in (tmp_path / "out").iterdir()}
    assert {f.path for f in files} == {HEAD_SHARD, INDEX, "config.json", "quantization_config.json"}


def test_the_layers_of_the_main_model_stay_quantized_as_they_were(quantized: Path, base: Path) -> None:
    kept(quantized, base)
    extra = read(quantized / "quantization_config.json")["extra_config"]
    main = {n.removesuffix(".weight") for n in all_tensors(base) if not n.startswith("mtp.")} - set(NARROW)
    assert not [m for m in main for key in extra if key == m or ("*" in key and re.search(key, m))]


def test_dropping_zeroes_the_count_and_says_nothing_of_the_head(quantized: Path, base: Path, tmp_path: Path) -> None:
    files = without_head(HeadFiles.read(quantized), Checkpoint.open(base).head).write(tmp_path / "out")
    config, source = read(tmp_path / "out" / "config.json"), read(base / "config.json")
    source["text_config"]["mtp_num_hidden_layers"] = 0
    assert config.pop("quantization_config") == quantization_config()
    assert config == source
    assert read(tmp_path / "out" / INDEX) == read(quantized / INDEX)
    assert {f.path for f in files} == {INDEX, "config.json", "quantization_config.json"}


def test_a_base_without_a_head_cannot_be_kept_and_is_told_to_drop(tmp_path: Path, quantized: Path) -> None:
    headless = pico_base(tmp_path / "headless", head=False)
    with pytest.raises(CheckpointError, match="has no MTP head: use mtp: drop"):
        keep_head(HeadFiles.read(quantized), Checkpoint.open(headless), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_head_loses_nothing_by_dropping(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", head=False)
    bits = write_packed(base, tmp_path / "packed")
    assemble(Checkpoint.open(base), Checkpoint.open(tmp_path / "packed"), bits, tmp_path / "quantized")
    files = HeadFiles.read(tmp_path / "quantized")
    assert without_head(files, None) == files


def test_a_head_with_fewer_layers_than_the_config_promises_is_refused(
    tmp_path: Path, quantized: Path, base: Path
) -> None:
    config = read(base / "config.json")
    config["text_config"]["mtp_num_hidden_layers"] = 2
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="promises 2 MTP layers and its tensors have 1"):
        keep_head(HeadFiles.read(quantized), Checkpoint.open(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_whose_layer_is_missing_is_refused(tmp_path: Path, quantized: Path, base: Path) -> None:
    tensors = {n: raw for n, raw in all_tensors(base).items() if not n.startswith("mtp.layers.")}
    write_checkpoint(tmp_path / "cut", {SHARD: tensors}, read(base / "config.json"))
    with pytest.raises(CheckpointError, match="promises 1 MTP layers and its tensors have 0"):
        keep_head(HeadFiles.read(quantized), Checkpoint.open(tmp_path / "cut"), tmp_path / "out")


def test_a_promised_head_without_a_tensor_is_refused_and_an_absent_one_is_not(tmp_path: Path, base: Path) -> None:
    check_head(Checkpoint.open(base))
    headless = pico_base(tmp_path / "headless", head=False)
    check_head(Checkpoint.open(headless))
    (headless / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="promises 1 MTP layers and its tensors have 0"):
        check_head(Checkpoint.open(headless))


def test_the_shards_of_a_base_that_hold_its_head_are_named_from_the_index(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", shards=6)
    weight_map = read(base / INDEX)["weight_map"]
    expected = sorted({shard for name, shard in weight_map.items() if name.startswith("mtp.")})
    assert shards_with_head(base) == expected and 0 < len(expected) < 6
    head = Checkpoint.open_shards(base, expected).head
    assert head is not None and set(head.names) == {n for n in weight_map if n.startswith("mtp.")}


def test_a_base_without_a_head_gives_one_shard_to_look_into(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", head=False, shards=3)
    assert shards_with_head(base) == ["model-00001-of-00003.safetensors"]
    assert Checkpoint.open(base).head is None


# A head inlined behind the last decoder layer, as DeepSeek and GLM have it.

TEXT = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
MAIN = {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", (2, 2), b"abcdefg%d" % i) for i in range(2)}
BEHIND = {
    "model.layers.2.eh_proj.weight": ("BF16", (1, 2), b"wxyz"),
    "model.layers.2.enorm.weight": ("F32", (1,), b"1234"),
    "model.layers.2.mlp.up_proj.weight": ("BF16", (2, 2), b"ABCDEFGH"),
}


def inlined(folder: Path) -> tuple[Path, Path]:
    """A base with such a head, and a checkpoint made of it."""
    base = write_checkpoint(folder / "base", {"b1.safetensors": MAIN, "b2.safetensors": BEHIND}, TEXT)
    quantization = quantization_config(block_name_to_quantize="model.layers", extra_config={})
    made = write_checkpoint(folder / "made", {SHARD: MAIN}, {**TEXT, "quantization_config": quantization})
    return base, made


def test_an_inlined_head_is_kept_bit_for_bit_and_excluded_in_both_configs(tmp_path: Path) -> None:
    base, made = inlined(tmp_path)
    assert shards_with_head(base) == ["b2.safetensors"]
    kept(made, base)
    assert raw_tensors(made / HEAD_SHARD) == BEHIND
    assert all_tensors(made) == MAIN | BEHIND
    checkpoint = Checkpoint.open(made)
    assert checkpoint.problems == [] and checkpoint.total_size == 32
    assert checkpoint.head is not None and checkpoint.head.layout == "inlined"
    extra = read(made / "quantization_config.json")["extra_config"]
    assert extra == read(made / "config.json")["quantization_config"]["extra_config"]
    assert {k for k in extra if "*" not in k} == {"model.layers.2.eh_proj", "model.layers.2.mlp.up_proj"}
    assert read(made / "config.json")["num_nextn_predict_layers"] == 1


def test_an_inlined_head_that_is_dropped_is_counted_no_more(tmp_path: Path) -> None:
    base, made = inlined(tmp_path)
    without_head(HeadFiles.read(made), Checkpoint.open(base).head).write(made)
    assert read(made / "config.json")["num_nextn_predict_layers"] == 0
    assert Checkpoint.open(made).head is None


def test_an_inlined_head_of_two_promised_layers_and_one_present_is_refused(tmp_path: Path) -> None:
    base, made = inlined(tmp_path)
    (base / "config.json").write_text(json.dumps({**TEXT, "num_nextn_predict_layers": 2}))
    with pytest.raises(CheckpointError, match="promises 2 MTP layers and its tensors have 1"):
        kept(made, base)


def test_keeping_and_then_dropping_leaves_no_word_of_an_inlined_head(tmp_path: Path) -> None:
    base, made = inlined(tmp_path)
    before = read(made / "config.json")["quantization_config"]
    head = Checkpoint.open(base).head
    kept(made, base)
    dropped = without_head(HeadFiles.read(made), head)
    assert dropped.config.quantization == {**before, "extra_config": {}}
