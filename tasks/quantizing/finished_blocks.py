"""Write a tuned block in a thread while the next one is tuned.

auto-round 0.16.1 moves a tuned block to the CPU, packs it on the GPU, and writes its files before it goes on. At 27 B
dimensions that takes 1.5 seconds per block. Here, the block is packed where it was tuned, and a thread writes its
files: the packed shard, the rounded weights, and last the list of finished blocks. So a block counts as finished only
when all of its files are complete. At most one block waits to be written.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from requant.tasks.checkpoint.modules import INTEGER_PARTS
from requant.tasks.checkpoint.torch_tensor import TORCH_DTYPES
from requant.tasks.checkpoint.writer import Held, place_held
from requant.tasks.quantizing.resume import block_file, rounded_weights


class _Shard(NamedTuple):
    path: Path
    tensors: Mapping[str, torch.Tensor]


class FinishedBlocks:
    """The tuned block that is being written. Its methods make replacements for auto-round's functions."""

    def __init__(self) -> None:
        self._model: Any = None  # while the blocks of a model are tuned
        self._thread: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None
        self._rounded: dict[str, torch.Tensor] = {}  # of the block that was tuned last
        self._shards: list[_Shard] = []  # of the block that was tuned last

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
            self._model = model
            try:
                yield
                self._wait()
            finally:
                self._model, self._written = None, None

    def keeping_rounded_weights(self, quantize_block: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `SignRoundQuantizer.quantize_block` to keep the block's rounded weights, where they are."""

        @functools.wraps(quantize_block)
        def quantize_and_keep(quantizer: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
            result = quantize_block(quantizer, block, *args, **kwargs)
            self._rounded = rounded_weights(block)
            return result

        return quantize_and_keep

    def leaving_in_place(self, move: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap `mv_module_from_gpu` to leave a tuned block that is packed at once where it is."""

        @functools.wraps(move)
        def mv_module_from_gpu(module: Any) -> Any:
            return module if self._model is not None and _is_packed_at_once() else move(module)

        return mv_module_from_gpu

    def adding_packed_parts(self, add: Callable[..., None]) -> Callable[..., None]:
        """Wrap `ShardWriter._add_tensor` to add only the packed parts of quantized layers."""

        @functools.wraps(add)
        def add_tensor(writer: Any, name: str, tensor: torch.Tensor) -> None:
            if name.rpartition(".")[2] in INTEGER_PARTS:
                add(writer, name, tensor)

        return add_tensor

    def flush_shard(self, writer: Any) -> None:
        """Replace `ShardWriter._flush_shard`: the file is complete once it has its name.

        While the blocks of a model are tuned, it is written together with the block's other files.
        """
        tensors = dict(writer.current_shard_tensors)
        writer.current_shard_tensors, writer.current_shard_size = OrderedDict(), 0
        if not tensors:
            return
        if not writer._existing_shards_discovered:
            writer._discover_existing_shards()
            writer._existing_shards_discovered = True
        writer.shard_counter += 1
        path = Path(writer.output_dir, f"model-shard-{writer.shard_counter:05d}.safetensors")
        writer.shard_meta.append({"tmp_file": path.name, "params": list(tensors), "dir": writer.output_dir})
        writer._all_saved.update(tensors)
        if self._model is None:
            write_tensors(path, tensors)
        else:
            self._shards.append(_Shard(path, tensors))

    def mark_block_done(self, state: Any, block_name: str, q_input: Any, input_ids: Any) -> None:
        """Replace `ResumeState.mark_block_done`: start to write the block's files, and last the manifest.

        Waits until the block before has been written, and raises what that has raised.
        """
        from auto_round.utils import get_module
        from auto_round.utils.resume import _atomic_write_json

        rounded_path = block_file(state.dir, len(state.completed_blocks))
        state.completed_blocks.append(block_name)
        manifest = {"signature": state.signature, "completed_blocks": list(state.completed_blocks)}
        shards, self._shards = self._shards, []
        rounded, self._rounded = self._rounded, {}
        if _is_packed_at_once():
            get_module(self._model, block_name).to("meta")

        def write() -> None:
            for shard in shards:
                write_tensors(shard.path, shard.tensors)
            write_tensors(rounded_path, _on_cpu(rounded))
            _atomic_write_json(state.manifest_path, manifest)

        self._wait()
        assert self._thread is not None
        self._written = self._thread.submit(write)

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()


def _is_packed_at_once() -> bool:
    """Check whether auto-round packs each block once it is tuned. It does not if it quantizes layers outside too."""
    from auto_round.context.compress import CompressContext

    return bool(CompressContext.get_context().is_immediate_saving)


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU, beside what the GPU computes meanwhile."""
    devices = (tensor.device for tensor in tensors.values() if tensor.is_cuda)
    with beside_computing(next(devices, torch.device("cpu"))):
        return {name: tensor.cpu() for name, tensor in tensors.items()}


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
