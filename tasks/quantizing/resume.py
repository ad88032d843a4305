"""What a killed or moved run goes on from: the packed files of its finished blocks, and their rounded weights.

auto-round keeps the values that the next block starts with: all samples' hidden states, twice, 5.4 GB a block at 27 B
dimensions, written anew after each block. Here each finished block leaves its rounded weights once, a byte each
(0.4 GB); a resumed run passes the samples through the finished blocks again, which takes a second or two a block and
gives the same values bit for bit. Below `resume/group_N/`:

    resume_manifest.json    auto-round's: the finished blocks, in order; written last
    block-NNNNN.safetensors the rounded weights of one: a layer's `.q` int8 or int16 and `.scale`, or its `.weight`

A file never changes once it has its name, so that it can be copied to another machine as it appears.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from requant.tasks.quantizing.events import EventSink, Resumed

MANIFEST = "resume_manifest.json"


def clean_unfinished(out: Path) -> None:
    """Make what a killed process left fit to be resumed.

    auto-round finds its finished blocks again as `model-shard-*.safetensors`. Killed while it writes one, it leaves a
    cut file that it then fails to open; killed while it renames them at the very end, it no longer finds those that
    have their final name already.
    """
    from requant.tasks.checkpoint.header import read_header
    from requant.tasks.errors import CheckpointError

    renamed = {*out.glob("*/model-*-of-*.safetensors"), *out.glob("*/model.safetensors")}
    for shard in sorted({*out.glob("*/model-shard-*.safetensors"), *renamed}):
        try:
            read_header(shard)
        except CheckpointError:
            shard.unlink()
            continue
        if shard in renamed:
            taken = [int(path.stem.rsplit("-", 1)[1]) for path in shard.parent.glob("model-shard-*.safetensors")]
            shard.rename(shard.with_name(f"model-shard-{max(taken, default=0) + 1:05d}.safetensors"))
    for index in out.glob("*/*.index.json"):
        index.unlink()


def block_file(folder: Path, index: int) -> Path:
    """Name the file of the rounded weights of a group's block number `index`."""
    return folder / f"block-{index:05d}.safetensors"


def signing_without_folder(sign: Callable[..., str]) -> Callable[..., str]:
    """Wrap `compute_run_signature`: leave out the folder of the base and the samples, which the stage key names."""

    @functools.wraps(sign)
    def compute_run_signature(model_dir: Any, scheme: str, dataset: str, *rest: Any) -> str:
        return sign(None, scheme, "", *rest)

    return compute_run_signature


def keeping_rounded_weights(tune: Callable[..., Any], rounded: dict[str, Any]) -> Callable[..., Any]:
    """Wrap `SignRoundQuantizer.quantize_block` to leave the block's `rounded_weights` in `rounded`."""

    @functools.wraps(tune)
    def quantize_block(self: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
        result = tune(self, block, *args, **kwargs)
        rounded.clear()
        rounded.update(rounded_weights(block))
        return result

    return quantize_block


def writing_rounded_weights(rounded: Mapping[str, Any]) -> Callable[..., None]:
    """Make a `ResumeState.mark_block_done` that writes `rounded` as the block's file, and then the manifest."""
    from auto_round.utils.resume import _atomic_write_json

    def mark_block_done(self: Any, block_name: str, q_input: Any, input_ids: Any) -> None:
        write_block(block_file(self.dir, len(self.completed_blocks)), rounded)
        self.completed_blocks.append(block_name)
        manifest = {"signature": self.signature, "completed_blocks": self.completed_blocks}
        _atomic_write_json(self.manifest_path, manifest)

    return mark_block_done


def passing_finished_blocks(quantize_blocks: Callable[..., None], report: EventSink) -> Callable[..., None]:
    """Wrap `CompressionOrchestrator._quantize_blocks` to pass the samples through the finished blocks first.

    `report` gets `Resumed` if there are any.
    """

    @functools.wraps(quantize_blocks)
    def resume_and_quantize(self: Any, model: Any, inputs: Any, block_names: Any, *args: Any, **kwargs: Any) -> None:
        state = kwargs.get("resume_state")
        if state is not None and state.resume_index:
            done = block_names[: state.resume_index]
            report(Resumed(blocks=len(done)))
            kwargs["q_input"], kwargs["resume_input_ids"] = pass_through(self, model, inputs, done, state.dir)
            if kwargs.get("pbar") is not None:
                kwargs["pbar"].n -= 1  # auto-round counts once more before it begins the first of the others
        quantize_blocks(self, model, inputs, block_names, *args, **kwargs)

    return resume_and_quantize


def rounded_weights(block: Any) -> dict[str, Any]:
    """A quantized block's layers as integers and scales, on the CPU: `q * scale` in float32 is the weight.

    A layer of which that is not exactly true is kept as its weight.
    """
    import torch

    kept: dict[str, Any] = {}
    for name, layer in block.named_modules():
        scale, weight = getattr(layer, "scale", None), getattr(layer, "weight", None)
        if not isinstance(scale, torch.Tensor) or weight is None:
            continue
        weight = weight.detach()
        wide = scale.to(weight.device)
        if scale.dim() == 2 and weight.dim() == 2 and weight.shape[1] % scale.shape[1] == 0:
            q = (weight.float().view(*scale.shape, -1) / wide.float()[..., None]).round().view(weight.shape)
            dtype = torch.int8 if float(q.abs().max()) < 128 else torch.int16
            if torch.equal(weight_of(q.to(dtype), wide, weight.dtype), weight):
                kept[f"{name}.q"], kept[f"{name}.scale"] = q.to(dtype).cpu(), scale.cpu().contiguous()
                continue
        kept[f"{name}.weight"] = weight.cpu().contiguous()
    return kept


def weight_of(q: Any, scale: Any, dtype: Any) -> Any:
    """The weight that integers `[out, in]` and scales `[out, groups]` stand for, as auto-round computes it."""
    return (q.float().view(*scale.shape, -1) * scale.float()[..., None]).view(q.shape).to(dtype)


def write_block(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors as a safetensors file that is whole as soon as it has its name."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".part")
    save_file(dict(tensors), temporary)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def trim(folder: Path) -> None:
    """Forget the blocks that cannot be resumed: in each manifest, the first whose file is not there and all behind it.

    What a killed machine left in the store can have a manifest that is ahead of the files in the index: it was sent,
    and the new index no more, or a block ended after the files were listed.
    """
    from requant.tasks.checkpoint.writer import write_json

    for path in folder.glob(f"group_*/{MANIFEST}"):
        manifest, done = _resumable(path)
        if not done:
            path.unlink()
        elif done != manifest["completed_blocks"]:
            write_json(path.parent, path.name, {**manifest, "completed_blocks": done})


def finished(folder: Path) -> int:
    """How many blocks below a work folder a run can go on from."""
    return sum(len(_resumable(path)[1]) for path in folder.glob(f"resume/group_*/{MANIFEST}"))


def _resumable(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A manifest, {} if it cannot be read, and its finished blocks up to the first whose file is missing."""
    try:
        manifest = json.loads(path.read_text())
        blocks = list(manifest["completed_blocks"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}, []
    there = itertools.takewhile(lambda i: block_file(path.parent, i).exists(), range(len(blocks)))
    return manifest, [blocks[i] for i in there]


def portable(folder: Path) -> list[str]:
    """The files of a work folder that another machine needs to go on, the manifests last.

    A packed file counts only if it is older than the manifest: it was whole when its block was marked as done.
    """
    manifests = sorted(folder.glob(f"resume/group_*/{MANIFEST}"))
    if not manifests:
        return []
    newest = max(path.stat().st_mtime_ns for path in manifests)
    files = [*folder.glob("out/*/model-shard-*.safetensors"), *folder.glob("resume/group_*/block-*.safetensors")]
    whole = sorted(path for path in files if path.stat().st_mtime_ns <= newest)
    ladder = [path for path in (folder / "ladder.json",) if path.exists()]
    return [path.relative_to(folder).as_posix() for path in [*whole, *ladder, *manifests]]


def worth_fetching(folder: Path, paths: list[str]) -> bool:
    """Whether what is offered has more finished blocks than the folder. What the folder has then gives way to it."""
    offered = sum(Path(path).name.startswith("block-") for path in paths)
    if offered <= finished(folder):
        return False
    for name in ("out", "resume"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "ladder.json").unlink(missing_ok=True)
    return True


def pass_through(orchestrator: Any, model: Any, inputs: Any, names: list[str], folder: Path) -> tuple[Any, Any]:
    """The samples behind the finished blocks `names`: (through the quantized ones, or None; through the base's).

    The same passes, in the same batches, as when the blocks were tuned (`compress_block`, auto-round 0.16.1).
    """
    import torch
    from auto_round.modeling.fused_moe.replace_modules import materialize_model_
    from auto_round.utils import convert_module_to_hp_if_necessary, get_module, mv_module_from_gpu
    from auto_round.utils.device_manager import device_manager
    from safetensors.torch import load_file

    composer = orchestrator.alg_composer
    reference, others = orchestrator._preprocess_block_inputs(copy.copy(inputs))
    quantized = None
    for index, name in enumerate(names):
        block = get_module(model, name)
        streamed = getattr(orchestrator.model_context, "_disk_stream_index", None) is not None
        if orchestrator.compress_context.low_cpu_mem_usage or streamed:
            orchestrator._offloader.reload(model, name)
        materialize_model_(block)
        convert_module_to_hp_if_necessary(block, orchestrator.model_context.amp_dtype, device_manager.device)
        block = composer.dispatch_block(block, reference, others)
        with torch.no_grad():
            before, reference = reference, composer.block_forward(block, reference, others)
            if composer.block_quantizer.enable_quanted_input:
                tensors = load_file(block_file(folder, index))
                for key in (k for k in tensors if not k.endswith(".scale")):
                    layer = block.get_submodule(key.rpartition(".")[0])
                    value = tensors[key].to(layer.weight.device)
                    if key.endswith(".q"):
                        scale = tensors[key.removesuffix("q") + "scale"].to(layer.weight.device)
                        value = weight_of(value, scale, layer.weight.dtype)
                    layer.weight.data.copy_(value)
                quantized = composer.block_forward(block, before if quantized is None else quantized, others)
        mv_module_from_gpu(block)
        block.to("meta")
    return quantized, reference
