"""Blocks that are written while the next one is tuned: when they count as finished, and what happens to errors."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from auto_round.context.compress import CompressContext
from auto_round.utils.resume import ResumeState
from safetensors.torch import load_file

from requant.tasks.quantizing import finished_blocks
from requant.tasks.quantizing.finished_blocks import FinishedBlocks, flush_shard
from requant.tasks.quantizing.resume import MANIFEST, block_file

NAMES = ["layers.0", "layers.1", "layers.2"]


class Written:
    """What a run leaves: a model of three blocks, auto-round's resume state, and its writer of shards."""

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self.folder = folder
        self.finished = FinishedBlocks(wait=wait)
        self.packed_by: list[threading.Thread] = []
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in NAMES)
        self.state = ResumeState(str(folder / "resume"), "signature", NAMES)
        self.writer: Any = SimpleNamespace(
            current_shard_tensors=OrderedDict(), current_shard_size=0, shard_counter=0, shard_meta=[], _all_saved=set(),
            output_dir=str(folder / "out"), _existing_shards_discovered=True,
        )  # fmt: skip

    def run(self, between: Callable[[int], None] = lambda number: None) -> None:
        """Let every block be tuned and written, as auto-round does. `between` is called after each."""
        pack, flush = self.finished.postponing(self._pack), self.finished.postponing(flush_shard)

        def quantize_blocks(orchestrator: Any, model: Any) -> None:
            for number, name in enumerate(NAMES):
                block = model.get_submodule(name)
                block.scale = torch.full((4, 2), 0.5)
                block.weight.data = torch.arange(-8.0, 8.0).view(4, 4) * 0.5
                pack(name, number)
                flush(self.writer)
                self.finished.mark_block_done(self.state, name, None, None)
                between(number)

        self.finished.writing(quantize_blocks)(None, self.model)

    def _pack(self, name: str, number: int) -> None:
        self.packed_by.append(threading.current_thread())
        self.writer.current_shard_tensors[f"{name}.qweight"] = torch.full((2, 4), number, dtype=torch.int32)

    def blocks(self) -> list[str]:
        path = self.folder / "resume" / MANIFEST
        return list(json.loads(path.read_text())["completed_blocks"]) if path.exists() else []

    def shards(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "out").glob("*"))


def test_every_block_is_on_the_disk_when_the_last_one_was_tuned(tmp_path: Path) -> None:
    written = Written(tmp_path)
    written.run()
    assert written.blocks() == NAMES
    assert written.shards() == [f"model-shard-{number:05d}.safetensors" for number in (1, 2, 3)]
    assert [meta["params"] for meta in written.writer.shard_meta] == [[f"{name}.qweight"] for name in NAMES]
    for number in range(3):
        packed = load_file(tmp_path / "out" / f"model-shard-{number + 1:05d}.safetensors")
        assert packed[f"layers.{number}.qweight"].tolist() == [[number] * 4] * 2
        rounded = load_file(block_file(tmp_path / "resume", number))
        assert rounded[".q"].flatten().tolist() == list(range(-8, 8)) and rounded[".scale"].shape == (4, 2)
    assert {parameter.device.type for parameter in written.model.parameters()} == {"meta"}
    assert threading.current_thread() not in written.packed_by


def test_a_block_counts_as_finished_only_when_all_of_its_files_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, may_write, original = Written(tmp_path), threading.Event(), finished_blocks.write_tensors

    def write_when_allowed(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        assert may_write.wait(60)
        original(path, tensors)

    monkeypatch.setattr(finished_blocks, "write_tensors", write_when_allowed)
    seen: list[tuple[list[str], list[str]]] = []

    def look(number: int) -> None:
        if number == 0:  # The next block is tuned while the first one waits to be written.
            seen.append((written.blocks(), written.shards()))
            may_write.set()

    written.run(look)
    assert seen == [([], [])] and written.blocks() == NAMES


def test_at_most_one_block_waits_to_be_written(tmp_path: Path) -> None:
    written = Written(tmp_path)
    finished: list[int] = []
    written.run(lambda number: finished.append(len(written.blocks())))
    assert all(count >= number for number, count in enumerate(finished))


def test_without_memory_for_two_a_block_is_written_before_the_next_one_starts(tmp_path: Path) -> None:
    written = Written(tmp_path, wait=True)
    finished: list[int] = []
    written.run(lambda number: finished.append(len(written.blocks())))
    assert finished == [1, 2, 3]


@pytest.mark.parametrize("number", range(3))
def test_what_writing_a_block_raises_ends_the_run_and_the_blocks_before_it_stay(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, original = Written(tmp_path), finished_blocks.write_tensors

    def fill_the_disk(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        if path == block_file(tmp_path / "resume", number):
            raise OSError(28, "No space left on device")
        original(path, tensors)

    monkeypatch.setattr(finished_blocks, "write_tensors", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        written.run()
    assert written.blocks() == NAMES[:number]


def test_a_shard_is_written_at_once_when_no_blocks_are_tuned(tmp_path: Path) -> None:
    written = Written(tmp_path)
    written.writer.current_shard_tensors["lm_head.qweight"] = torch.ones(2, 2, dtype=torch.int32)
    flush = written.finished.postponing(flush_shard)
    flush(written.writer)
    assert written.shards() == ["model-shard-00001.safetensors"] and not written.writer.current_shard_tensors
    flush(written.writer)
    assert written.writer.shard_counter == 1  # nothing to write


def test_only_packed_parts_are_added_to_a_shard_and_the_rest_does_not_count_as_missing() -> None:
    added: list[str] = []
    finished = FinishedBlocks()
    add = finished.adding_packed_parts(lambda writer, name, tensor: added.append(name))
    writer = SimpleNamespace(reverse_weight_transforms=None, reverse_checkpoint_conversion_mapping={})
    for part in ("qweight", "scales", "qzeros", "g_idx", "bias"):
        add(writer, f"model.layers.0.mlp.{part}", torch.ones(1))
    for name in ("model.embed.weight", "model.visual.blocks.3.norm.weight"):
        add(writer, name, torch.ones(1))
    assert [name.rpartition(".")[2] for name in added] == ["qweight", "scales", "qzeros", "g_idx"]
    source = dict.fromkeys(["embed.weight", "model.visual.blocks.3.mlp.weight", "mtp.layers.0.norm.weight"], "file")
    find = finished.hiding_what_was_left_out(lambda source_dir, target_dir: (source, {"a": "b"}))
    assert find("base", "out") == ({"mtp.layers.0.norm.weight": "file"}, {"a": "b"})
    assert finished.hiding_what_was_left_out(lambda source_dir, target_dir: None)("base", "out") is None


def test_tensors_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {
        "int8": torch.arange(-4, 4, dtype=torch.int8).view(2, 4),
        "transposed": torch.arange(6, dtype=torch.int32).view(2, 3).t(),
        "bf16": torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
        "single": torch.tensor(2.0, dtype=torch.float16),
        "none": torch.empty(0, 3),
    }
    finished_blocks.write_tensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_tuned_block_stays_where_it_is_to_be_packed_and_other_modules_are_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(is_immediate_saving=True)
    monkeypatch.setattr(CompressContext, "get_context", lambda: context)
    written, moved = Written(tmp_path), list[int]()
    move = written.finished.leaving_in_place(moved.append)
    move(0)
    written.run(move)
    context.is_immediate_saving = False  # Layers outside of the blocks are quantized too: nothing is packed yet.
    Written(tmp_path / "other").finished.writing(lambda orchestrator, model: move(4))(None, None)
    assert moved == [0, 4]
