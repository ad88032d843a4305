"""requant mtp-fix: checkpoints made elsewhere get their head back, in place and once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.assemble import assemble
from requant.tasks.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint
from requant.tasks.checkpoint.head import HEAD_SHARD
from requant.tasks.checkpoint.repair import RepairSource, repair
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import (
    FULL,
    all_tensors,
    raw_tensors,
    safetensors_bytes,
    write_packed,
)
from tests.factories.pico import pico_base
from tests.factories.repairs import elsewhere, fixed, killed_at, snapshot


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_base(tmp_path_factory.mktemp("repair") / "base")


def head_of(folder: Path) -> dict[str, Any]:
    return {n: raw for n, raw in all_tensors(folder).items() if n.startswith("mtp.")}


KINDS: dict[str, dict[str, Any]] = {
    "packed fc": {"packed": ("mtp.fc",)},
    "packed layers": {"packed": ("mtp.layers.0.mlp.up_proj", "mtp.layers.0.self_attn.q_proj")},
    "retyped": {},
    "a single file": {"single": True, "packed": ("mtp.fc",)},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_head_comes_back_bit_for_bit_and_everything_else_stays(kind: Any, base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made", **kind)
    others = {n: raw for n, raw in all_tensors(folder).items() if not n.startswith("mtp.")}
    result = fixed(folder, base)
    assert result.changed is True and result.tensors_restored == 15 and result.source == "base"
    assert raw_tensors(folder / HEAD_SHARD) == head_of(base)
    assert all_tensors(folder) == others | head_of(base)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.problems == [] and not (folder / SINGLE).exists()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantization_config.json").read_text())
    assert config["extra_config"]["mtp.fc"] == config["extra_config"][".*mtp.*"] == FULL
    assert all(result.engines[e].mtp for e in ("vllm", "sglang"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_second_repair_changes_nothing(kind: Any, base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made", **kind)
    fixed(folder, base)
    before = snapshot(folder)
    assert fixed(folder, base).changed is False
    assert snapshot(folder) == before


def test_a_repaired_checkpoint_needs_no_base_any_more(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made", packed=("mtp.fc",))
    fixed(folder, base)
    before = snapshot(folder)
    assert repair(folder, None).changed is False
    assert snapshot(folder) == before


def test_a_head_that_is_missing_altogether_is_put_in(base: Path, tmp_path: Path) -> None:
    bits = write_packed(base, tmp_path / "packed")
    assemble(Checkpoint.open(base), Checkpoint.open(tmp_path / "packed"), bits, tmp_path / "made")
    assert fixed(tmp_path / "made", base).tensors_restored == 15
    assert head_of(tmp_path / "made") == head_of(base)
    assert Checkpoint.open(tmp_path / "made").problems == []


def test_one_flipped_bit_in_the_head_is_restored(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made")
    fixed(folder, base)
    tensors = raw_tensors(folder / HEAD_SHARD)
    dtype, shape, data = tensors["mtp.norm.weight"]
    tensors["mtp.norm.weight"] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])
    (folder / HEAD_SHARD).write_bytes(safetensors_bytes(tensors))
    assert fixed(folder, base).tensors_restored == 1
    assert head_of(folder) == head_of(base)


def test_an_index_with_a_wrong_total_size_is_corrected(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made")
    fixed(folder, base)
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] = 0
    (folder / INDEX).write_text(json.dumps(index))
    assert fixed(folder, base).changed is True
    assert Checkpoint.open(folder).problems == []


def test_a_missing_processor_file_is_copied_from_the_base(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made")
    fixed(folder, base)
    (folder / "video_preprocessor_config.json").unlink()
    result = fixed(folder, base)
    assert (result.changed, result.tensors_restored) == (True, 0)
    name = "video_preprocessor_config.json"
    assert (folder / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("inside", [False, True], ids=["exchanged", "moved in"])
@pytest.mark.parametrize(
    "single", [pytest.param(True, id="single", marks=pytest.mark.slow), pytest.param(False, id="sharded")]
)
def test_a_repair_killed_at_any_step_leaves_a_whole_checkpoint_and_is_finished_by_the_next_one(
    single: bool, inside: bool, base: Path, tmp_path: Path
) -> None:
    """SIGKILL before the first, second, ... call that touches a file, until one call lives to its end.

    A process whose working folder is the checkpoint's gets its files moved in one by one instead.
    """
    whole = elsewhere(base, tmp_path / "whole" / "made", packed=("mtp.fc",), single=single)
    before = names_of(whole)
    others = {n: raw for n, raw in all_tensors(whole).items() if not n.startswith("mtp.")}
    expected = others | head_of(base)
    after = {n: tuple(shape) for n, (_, shape, _) in expected.items()}
    steps, killed = 0, True
    while killed:
        folder = Path(shutil.copytree(whole, tmp_path / f"step-{steps}" / "made"))
        killed = killed_at(steps, lambda folder=folder: fixed(folder, base), folder if inside else tmp_path)
        between = Checkpoint.open(folder)
        between_names = {n: t.shape for n, t in between.tensors.items()}
        assert not [p for p in between.fatal if "lies beside" not in p]
        if not inside:
            assert between.problems == [] and between_names in (before, after)
        fixed(folder, base)
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.problems == []
        assert {n: (t.dtype, t.shape, t.read()) for n, t in checkpoint.tensors.items()} == expected
        assert not [p for p in (*folder.parent.iterdir(), *folder.iterdir()) if p.name.startswith(".")]
        shutil.rmtree(folder.parent)
        steps += killed
    assert steps > 10


@pytest.mark.parametrize("with_other_tensors", [False, True], ids=["the head alone", "other tensors too"])
@pytest.mark.parametrize("inside", [False, True], ids=["exchanged", "moved in"])
def test_a_repair_of_a_shard_that_has_the_heads_name_already_is_finished_by_the_next_one(
    inside: bool, with_other_tensors: bool, base: Path, tmp_path: Path
) -> None:
    """As above, and index and shard may disagree about the head until the next repair, but about nothing else."""
    made = elsewhere(base, tmp_path / "whole" / "made", packed=("mtp.fc",))
    repair(made, RepairSource(base), precision="int4")
    if with_other_tensors:
        move_into_head_shard(made, "lm_head.weight")
    others = {n: raw for n, raw in all_tensors(made).items() if not n.startswith("mtp.")}
    steps, killed = 0, True
    while killed:
        folder = Path(shutil.copytree(made, tmp_path / f"step-{steps}" / "made"))
        killed = killed_at(steps, lambda folder=folder: fixed(folder, base), folder if inside else tmp_path)
        between = Checkpoint.open(folder)
        assert not [p for p in between.fatal if not re.search(r"\bmtp\.", p)]
        fixed(folder, base)
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.problems == []
        assert {n: (t.dtype, t.shape, t.read()) for n, t in checkpoint.tensors.items()} == others | head_of(base)
        shutil.rmtree(folder.parent)
        steps += killed
    assert steps > 10


def move_into_head_shard(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    old = folder / index["weight_map"][name]
    tensors = raw_tensors(old)
    moved = raw_tensors(folder / HEAD_SHARD) | {name: tensors.pop(name)}
    old.write_bytes(safetensors_bytes(tensors))
    (folder / HEAD_SHARD).write_bytes(safetensors_bytes(moved))
    index["weight_map"][name] = HEAD_SHARD
    (folder / INDEX).write_text(json.dumps(index))


def names_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return {n: t.shape for n, t in Checkpoint.open(folder).tensors.items()}


def test_a_base_of_another_size_or_without_a_head_is_refused_and_changes_nothing(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made")
    before = snapshot(folder)
    headless = pico_base(tmp_path / "headless", head=False)
    with pytest.raises(CheckpointError, match="has no MTP head"):
        fixed(folder, headless)
    other = pico_base(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["hidden_size"] = 128
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not the base"):
        fixed(folder, other)
    assert snapshot(folder) == before
