"""Pack a tuned block and write it, in a thread while the next one is tuned.

auto-round 0.16.1 moves a tuned block to the CPU, packs it on the GPU, and writes its files before it goes on. At 27 B
dimensions that takes 1.5 seconds per block. Here, a thread packs the block where it was tuned and writes its files: the
packed shard, the rounded weights, and last the list of finished blocks. So a block counts as finished only when all of
its files are complete. At most one block waits to be written.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from requant.tasks.checkpoint.modules import INTEGER_PARTS
from requant.tasks.checkpoint.torch_tensor import TORCH_DTYPES
from requant.tasks.checkpoint.writer import Held, place_held
from requant.tasks.quantizing.resume import block_file, rounded_weights


class FinishedBlocks:
    """The tuned block that is being written. Its methods make replacements for auto-round's functions.

    `wait`: write each block before the next one starts, since the GPU has no memory for two.
    """

    def __init__(self, *, wait: bool = False) -> None:
        self._wait_at_once = wait
        self._model: Any = None
        self._tuning_thread: int | None = None  # while the blocks of a model are tuned
        self._thread: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None
        self._left_out = set[str]()  # the base's names of tensors that are not written
        self._packing: list[Callable[[], None]] = []  # what is left to do with the block that was tuned last

    def writing(self, quantize_blocks: Callable[..., None]) -> Callable[..., None]:
        """Wrap `CompressionOrchestrator._quantize_blocks` to return when the last block has been written.

        The wrapper raises what writing has raised.
        """

        @functools.wraps(quantize_blocks)
        def quantize_and_write(orchestrator: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            with self._open(model):
                quantize_blocks(orchestrator, model, *args, **kwargs)

        return quantize_and_write

    @contextmanager
    def _open(self, model: Any) -> Iterator[None]:
        with ThreadPoolExecutor(1, "finished blocks") as self._thread:
            self._model, self._tuning_thread = model, threading.get_ident()
            try:
                yield
                self._wait()
            finally:
                self._model, self._tuning_thread, self._written = None, None, None

    def leaving_in_place(self, move: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap `mv_module_from_gpu` to leave a tuned block that is packed at once where it is."""
        from auto_round.context.compress import CompressContext

        @functools.wraps(move)
        def mv_module_from_gpu(module: Any) -> Any:
            # auto-round packs each block once it is tuned, unless it quantizes layers outside of the blocks too.
            packed_at_once = CompressContext.get_context().is_immediate_saving
            return module if self._tuning_thread is not None and packed_at_once else move(module)

        return mv_module_from_gpu

    def postponing(self, pack_or_write: Callable[..., None]) -> Callable[..., None]:
        """Wrap a function that auto-round calls with a tuned block, to be called in the thread. Elsewhere it is called.

        These are `immediate_pack`, `ShardWriter.write` and its `_flush_shard`, in this order.
        """

        @functools.wraps(pack_or_write)
        def postpone(*args: Any, **kwargs: Any) -> None:
            call = functools.partial(pack_or_write, *args, **kwargs)
            if threading.get_ident() == self._tuning_thread:
                self._packing.append(call)
            else:
                call()

        return postpone

    def adding_packed_parts(self, add: Callable[..., None]) -> Callable[..., None]:
        """Wrap `ShardWriter._add_tensor` to add only the packed parts of quantized layers."""
        from auto_round.utils import revert_checkpoint_conversion_mapping, revert_name_with_weight_transforms

        @functools.wraps(add)
        def add_tensor(writer: Any, name: str, tensor: torch.Tensor) -> None:
            if name.rpartition(".")[2] in INTEGER_PARTS:
                add(writer, name, tensor)
            elif writer.reverse_weight_transforms is not None:
                self._left_out.add(revert_name_with_weight_transforms(name, writer.reverse_weight_transforms))
            else:
                mapping = writer.reverse_checkpoint_conversion_mapping
                self._left_out.add(revert_checkpoint_conversion_mapping(name, mapping))

        return add_tensor

    def hiding_what_was_left_out(self, find_tensors: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `_resolve_tensor_shard_maps` to leave out of the base's tensors what `adding_packed_parts` left out.

        auto-round compares the base's tensors with those that it wrote, as it does here: by module or by block. It
        copies what the model did not have, such as an MTP head, and its config says what it packed of that.
        """

        @functools.wraps(find_tensors)
        def resolve_tensor_shard_maps(source_dir: str, target_dir: str) -> Any:
            maps = find_tensors(source_dir, target_dir)
            if maps is None:
                return None
            source, saved = maps
            there = {_module_or_block(name) for name in self._left_out}
            there |= {name.partition(".")[2] for name in there}
            return {name: file for name, file in source.items() if _module_or_block(name) not in there}, saved

        return resolve_tensor_shard_maps

    def mark_block_done(self, state: Any, block_name: str, q_input: Any, input_ids: Any) -> None:
        """Replace `ResumeState.mark_block_done`: start to pack the block and to write its files, the manifest last.

        Waits until the block before has been written, and raises what that has raised.
        """
        from auto_round.utils.resume import _atomic_write_json

        block = self._model.get_submodule(block_name)
        path = block_file(state.dir, len(state.completed_blocks))
        state.completed_blocks.append(block_name)
        manifest = {"signature": state.signature, "completed_blocks": list(state.completed_blocks)}
        packing, self._packing = self._packing, []

        def finish() -> None:
            device = next((parameter.device for parameter in block.parameters()), torch.device("cpu"))
            with torch.no_grad(), beside_computing(device):
                rounded = {name: tensor.cpu() for name, tensor in rounded_weights(block).items()}
                for step in packing:
                    step()
            if packing:
                block.to("meta")
            write_tensors(path, rounded)
            _atomic_write_json(state.manifest_path, manifest)

        self._wait()
        assert self._thread is not None
        self._written = self._thread.submit(finish)
        if self._wait_at_once:
            self._wait()

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()


def _module_or_block(name: str) -> str:
    """Return the name of a tensor up to its first number, or else that of its module."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1])


class DroppedBlocks(FinishedBlocks):
    """The tuned block of a peer (peers.py), which the first process packs and writes."""

    def mark_block_done(self, state: Any, block_name: str, q_input: Any, input_ids: Any) -> None:
        """Replace `ResumeState.mark_block_done`: drop the block."""
        state.completed_blocks.append(block_name)
        self._packing = []
        self._model.get_submodule(block_name).to("meta")


def flush_shard(writer: Any) -> None:
    """Write what a `ShardWriter` holds. Replaces its `_flush_shard`: here, a file is complete once it has its name."""
    tensors = dict(writer.current_shard_tensors)
    writer.current_shard_tensors, writer.current_shard_size = OrderedDict(), 0
    if not tensors:
        return
    if not writer._existing_shards_discovered:
        writer._discover_existing_shards()
        writer._existing_shards_discovered = True
    writer.shard_counter += 1
    path = Path(writer.output_dir, f"model-shard-{writer.shard_counter:05d}.safetensors")
    write_tensors(path, tensors)
    writer.shard_meta.append({"tmp_file": path.name, "params": list(tensors), "dir": writer.output_dir})
    writer._all_saved.update(tensors)


@contextmanager
def beside_computing(device: torch.device) -> Iterator[None]:
    """Let copies of this thread run in a stream of their own, after what the device has been told to compute so far."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file from tensors on the CPU. It gets its name when it is complete and on the disk.

    Other threads go on meanwhile, which safetensors' own `save_file` (0.8) does not let them.
    """
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    held = {}
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        held[name] = Held(names[tensor.dtype], tuple(tensor.shape), data)
    place_held(path, held)
