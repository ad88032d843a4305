"""Weight files beside an index, or without one: which belong to the model, and what a repair makes of them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.advice import FIX_INDEX
from requant.tasks.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.checkpoint.repair import RepairSource, repair
from requant.tasks.checkpoint.shards import MOVE, lost_numbers
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import all_tensors, raw_tensors, safetensors_bytes, write_checkpoint
from tests.factories.heads import make_base
from tests.factories.repairs import snapshot

ONE = "model-00001-of-00001.safetensors"
Raw = dict[str, tuple[str, tuple[int, ...], bytes]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "made", "mtp")


def laid_out(folder: Path, shards: dict[str, Raw], indexed: set[str]) -> None:
    """Write the shards anew, of which the index names some; no index if it names none."""
    config = json.loads((folder / "config.json").read_text())
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    write_checkpoint(folder, {n: raw for n, raw in shards.items() if n in indexed}, config, index=bool(indexed))
    for name, raw in shards.items():
        (folder / name).write_bytes(safetensors_bytes(raw))


def halves(folder: Path) -> tuple[Raw, Raw]:
    """The main model's tensors, and the head's."""
    tensors = all_tensors(folder)
    head = {name: raw for name, raw in tensors.items() if name.startswith("mtp.")}
    return {name: raw for name, raw in tensors.items() if name not in head}, head


def sentences(folder: Path, part: str) -> list[str]:
    return [problem for problem in inspect_checkpoint(folder).problems if part in problem]


@pytest.mark.parametrize("name", ["mtp.safetensors", "model_mtp.safetensors", "model-00002-of-00002.safetensors"])
def test_an_only_copy_beside_the_index_is_never_condemned_and_gets_indexed(name: str, base: Path) -> None:
    main, head = halves(base)
    laid_out(base, {ONE: main, name: head}, {ONE})
    (sentence,) = sentences(base, f"{name} is a shard")
    assert sentence.endswith(FIX_INDEX) and f"{len(head) - 1} more tensors" in sentence
    result = repair(base, None)
    assert (result.writes, result.removes, result.problems) == ([INDEX], [], [])
    assert all_tensors(base) == main | head and raw_tensors(base / name) == head


def test_a_file_that_repeats_some_tensors_stays_and_the_others_are_indexed(base: Path) -> None:
    main, head = halves(base)
    shared = {"model.norm.weight": main["model.norm.weight"], "lm_head.weight": ("BF16", (1,), b"xy")}
    laid_out(base, {ONE: main, "mtp.safetensors": head | shared}, {ONE})
    repair(base, None)
    assert {n: (t.dtype, t.shape, t.read()) for n, t in Checkpoint.open(base).tensors.items()} == main | head
    assert raw_tensors(base / "mtp.safetensors") == head | shared
    (sentence,) = inspect_checkpoint(base).problems
    assert "mtp.safetensors is a shard" in sentence and "lm_head.weight" in sentence


BESIDE: dict[str, tuple[Raw, str]] = {
    "an adapter": ({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": ("BF16", (1,), b"ab")}, "lora_A"),
    "a drafter": ({"midlayer.self_attn.q_proj.weight": ("BF16", (1,), b"ab")}, "midlayer"),
    "a layer too many": ({"model.layers.99.mlp.up_proj.weight": ("BF16", (1,), b"ab")}, "layers.99"),
    "another form": ({"model.layers.0.mlp.up_proj.qweight": ("I32", (1,), b"abcd")}, "up_proj.qweight"),
    "a copy": ({}, "all 1 tensors"),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_no_part_of_the_model_stays_and_may_be_moved(kind: str, base: Path) -> None:
    main, head = halves(base)
    raw, part = BESIDE[kind]
    raw = raw or {"lm_head.weight": main["lm_head.weight"]}
    laid_out(base, {ONE: main | head, "x.safetensors": raw}, {ONE})
    (sentence,) = inspect_checkpoint(base).problems
    assert sentence.startswith("x.safetensors is a shard") and part in sentence and sentence.endswith(MOVE)
    before = snapshot(base)
    assert repair(base, None).problems == [sentence] and snapshot(base) == before


QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
VISION = {"vision_config": {"model_type": "x"}}
# What a tensor's name begins with, what the config says besides, and whether the tensor belongs to the model.
OF_MODEL: list[tuple[str, dict[str, Any], bool]] = [
    ("visual.blocks.0.attn.qkv", QWEN3, False), ("score", QWEN3, False), ("model.fc", QWEN3, False),
    ("model.norm", QWEN3, True), ("mtp.layers.0.input_layernorm", QWEN3, True),
    ("model.layers.1.mlp.up_proj", QWEN3, True), ("model.visual.blocks.0.attn.qkv", QWEN3 | VISION, True),
    ("visual.blocks.0.attn.qkv", {}, False), ("visual.blocks.0.attn.qkv", VISION, True), ("score", {}, False),
    ("talker.model.norm", {}, False), ("model.fc", {}, True),
]  # fmt: skip


@pytest.mark.parametrize(("module", "config", "is_own"), OF_MODEL)
def test_a_tensor_that_no_part_of_the_model_holds_is_never_indexed(
    module: str, config: dict[str, Any], is_own: bool, base: Path
) -> None:
    main, head = halves(base)
    name = f"{module}.weight"
    kept = {n: raw for n, raw in (main | head).items() if n != name}
    laid_out(base, {ONE: kept, "x.safetensors": {name: ("BF16", (1,), b"ab")}}, {ONE})
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    (sentence,) = sentences(base, "x.safetensors is a shard")
    assert sentence.endswith(FIX_INDEX if is_own else MOVE) and name in sentence


@pytest.mark.parametrize("name", [SINGLE, "model-00001-of-00002.safetensors"])
def test_without_an_index_all_files_are_read_as_engines_read_them(name: str, base: Path) -> None:
    main, head = halves(base)
    laid_out(base, {name: main, "model-00002-of-00002.safetensors": head} if name != SINGLE else
             {SINGLE: main, "mtp.safetensors": head}, set())  # fmt: skip
    result = inspect_checkpoint(base)
    assert result.engines["vllm"].mtp is True and result.engines["transformers"].loads is (name == SINGLE)
    (sentence,) = result.problems
    assert sentence.startswith(f"there is no {INDEX}") and sentence.endswith(FIX_INDEX)
    assert repair(base, None).problems == []
    assert all_tensors(base) == main | head and Checkpoint.open(base).sound().shards


def test_a_checkpoint_of_one_file_under_another_name_gets_an_index(base: Path) -> None:
    main, head = halves(base)
    laid_out(base, {"weights.safetensors": main | head}, set())
    with pytest.raises(CheckpointError, match="there is no model"):
        Checkpoint.open(base).sound()
    repair(base, None)
    assert all_tensors(base) == main | head


def test_a_series_with_a_gap_is_not_indexed(base: Path) -> None:
    main, head = halves(base)
    laid_out(base, {"model-00001-of-00003.safetensors": main, "model-00003-of-00003.safetensors": head}, set())
    assert sentences(base, "model-00002-of-00003.safetensors of the series is missing: download it again")
    assert not sentences(base, FIX_INDEX)
    before = snapshot(base)
    with pytest.raises(CheckpointError, match="of the series is missing"):
        repair(base, None)
    assert snapshot(base) == before


def test_two_files_with_the_same_tensors_and_no_index_are_not_decided_between(base: Path) -> None:
    main, head = halves(base)
    laid_out(base, {"fp16.safetensors": main, "bf16.safetensors": main | head}, set())
    assert sentences(base, "and there is no index") and not sentences(base, FIX_INDEX)
    with pytest.raises(CheckpointError, match="and there is no index"):
        repair(base, None)


def test_a_single_file_with_tensors_that_the_index_has_nowhere_is_taken_into_the_index(base: Path) -> None:
    main, head = halves(base)
    laid_out(base, {ONE: main, SINGLE: head}, {ONE})
    assert sentences(base, f"{SINGLE} lies beside a sharded index")[0].endswith(FIX_INDEX)
    result = repair(base, None)
    assert SINGLE in result.removes and result.problems == [] and all_tensors(base) == main | head


def test_an_index_of_other_names_is_written_anew_only_if_all_is_there(base: Path) -> None:
    main, head = halves(base)
    laid_out(base, {ONE: main | head}, {ONE})
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] = dict.fromkeys([*index["weight_map"], "lm_head.lost"], "model-00001-of-00009.safetensors")
    (base / INDEX).write_text(json.dumps(index))
    assert sentences(base, "which is missing: download it again")
    with pytest.raises(CheckpointError, match="which is missing"):
        repair(base, None)
    del index["weight_map"]["lm_head.lost"]
    (base / INDEX).write_text(json.dumps(index))
    assert repair(base, None).problems == [] and all_tensors(base) == main | head


@pytest.mark.parametrize(("names", "lost"), [
    (["a-1-of-3.safetensors", "a-3-of-3.safetensors"], ["a-2-of-3.safetensors"]),
    (["a-00001-of-00001.safetensors", "b.safetensors"], []),
    (["a-00001-of-00002.safetensors", "b-00002-of-00002.safetensors"],
     ["a-00002-of-00002.safetensors", "b-00001-of-00002.safetensors"]),
])  # fmt: skip
def test_the_numbers_of_a_series_say_what_is_missing(names: list[str], lost: list[str]) -> None:
    assert lost_numbers(names) == lost


def test_a_number_of_shards_that_nobody_has_costs_no_time() -> None:
    assert 0 < len(lost_numbers(["a-000001-of-999999.safetensors"])) <= 100_000


def test_a_link_that_leads_nowhere_is_told(base: Path, tmp_path: Path) -> None:
    (base / "x.safetensors").symlink_to(tmp_path / "nowhere")
    assert sentences(base, "x.safetensors is a shard which the index does not name, and it leads to no file")


@pytest.mark.parametrize("linked", [True, False], ids=["a link to another disk", "a disk without hard links"])
def test_a_shard_that_cannot_have_a_second_name_is_renamed_all_the_same(
    linked: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, head = halves(base)
    made, blob = Path(shutil.copytree(base, tmp_path / "model")), tmp_path / "blob"
    laid_out(made, {SINGLE: main}, set())
    if linked:
        (made / SINGLE).rename(blob)
        (made / SINGLE).symlink_to("../blob")

    def refuse(source: Any, target: Any, **options: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert repair(made, RepairSource(base)).removes == [SINGLE]
    assert all_tensors(made) == main | head and Checkpoint.open(made).problems == []
    assert not linked or raw_tensors(blob) == main


def test_the_head_of_a_base_may_lie_beside_its_index(base: Path, tmp_path: Path) -> None:
    main, head = halves(base)
    made = Path(shutil.copytree(base, tmp_path / "model"))
    laid_out(made, {ONE: main}, {ONE})
    laid_out(base, {ONE: main, "mtp.safetensors": head}, {ONE})
    before = snapshot(base)
    assert repair(made, RepairSource(base)).source == "base"
    assert all_tensors(made) == main | head and snapshot(base) == before


@pytest.mark.parametrize("kind", ["all", "the main model", "another dtype", "a part"])
def test_only_transformers_minds_a_single_file_beside_an_index_and_only_if_it_misses_tensors(
    kind: str, base: Path
) -> None:
    main, head = halves(base)
    raw = {
        "all": main | head,
        "the main model": main,
        "another dtype": main | {"model.norm.weight": ("F32", (64,), bytes(256))},
        "a part": {"lm_head.weight": main["lm_head.weight"]},
    }[kind]
    laid_out(base, {ONE: main | head, SINGLE: raw}, {ONE})
    found = inspect_checkpoint(base)
    assert found.engines["vllm"].mtp is True and found.engines["sglang"].mtp is True
    assert found.engines["transformers"].loads is (kind != "a part")
    (sentence,) = found.problems
    assert SINGLE in sentence and sentence.endswith(MOVE)
    with (
        contextlib.nullcontext() if kind in {"all", "the main model"} else pytest.raises(CheckpointError, match=SINGLE)
    ):
        Checkpoint.open(base).sound()
    before = snapshot(base)
    assert repair(base, None, dry_run=True).problems == repair(base, None).problems == [sentence]
    assert snapshot(base) == before


@pytest.mark.parametrize("name", [SINGLE, "more.safetensors"])
def test_a_dry_run_promises_what_the_repair_then_makes_of_a_file_that_stays(name: str, base: Path) -> None:
    """The head is in that file alone, and a tensor of the main model is in it too."""
    main, head = halves(base)
    laid_out(base, {ONE: main, name: head | {"lm_head.weight": main["lm_head.weight"]}}, {ONE})
    promised, done = repair(base, None, dry_run=True), repair(base, None)
    assert done.changed is True and (base / name).exists()
    assert (promised.engines, promised.problems) == (done.engines, done.problems)
    assert [name in sentence for sentence in done.problems] == [True]
    assert done.engines["vllm"].mtp is True and done.engines["transformers"].loads is (name != SINGLE)
