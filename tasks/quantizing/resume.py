"""Continue a run that was killed or moved: from the packed files of its finished blocks and their rounded weights.

auto-round saves the inputs of the next block: the hidden states of all samples, twice. At 27 B dimensions it writes
5.4 GB after each block. Here, each finished block saves its rounded weights instead, one byte per weight (0.4 GB). A
resumed run passes the samples through the finished blocks again. That takes one or two seconds per block and gives the
same values bit for bit. The files in `resume/group_N/` are:

    resume_manifest.json       auto-round's list of the finished blocks, in order; written last
    block-NNNNN.safetensors    the rounded weights of a block: per layer `.q` (int8 or int16) and `.scale`, or `.weight`

No file changes once it has its name, so it can be copied to another machine as soon as it appears.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.tasks.quantizing.events import EventSink, Resumed

if TYPE_CHECKING:
    import torch

MANIFEST = "resume_manifest.json"


def clean_unfinished(out: Path) -> None:
    """Repair the output folder that a killed process left, so that auto-round can resume from it.

    auto-round finds its finished blocks as `model-shard-*.safetensors`. If it was killed while it wrote one, it fails
    to open the incomplete file: this function deletes it. If it was killed while it renamed the files at the end, it
    does not find those with their final name: this function renames them back.
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
    """Return the path of the rounded weights of block number `index` of a group."""
    return folder / f"block-{index:05d}.safetensors"


def signing_without_folder(sign: Callable[..., str]) -> Callable[..., str]:
    """Wrap `compute_run_signature` to leave out the samples and the folder of the base, which machines have elsewhere.

    The stage key covers both.
    """

    @functools.wraps(sign)
    def compute_run_signature(model_dir: Any, scheme: str, dataset: str, *rest: Any) -> str:
        return sign(None, scheme, "", *rest)

    return compute_run_signature


def passing_finished_blocks(quantize_blocks: Callable[..., None], report: EventSink) -> Callable[..., None]:
    """Wrap `CompressionOrchestrator._quantize_blocks` to pass the samples through the finished blocks first.

    If there are any, `report` gets `Resumed`.
    """

    @functools.wraps(quantize_blocks)
    def resume_and_quantize(self: Any, model: Any, inputs: Any, block_names: Any, *args: Any, **kwargs: Any) -> None:
        state = kwargs.get("resume_state")
        if state is not None and state.resume_index:
            done = block_names[: state.resume_index]
            report(Resumed(blocks=len(done)))
            kwargs["q_input"], kwargs["resume_input_ids"] = pass_through(self, model, inputs, done, state.dir)
            if kwargs.get("pbar") is not None:
                kwargs["pbar"].n -= 1  # auto-round adds 1 before it begins the first unfinished block.
        quantize_blocks(self, model, inputs, block_names, *args, **kwargs)

    return resume_and_quantize


def rounded_weights(block: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a quantized block's layers, on the device where they are.

    Of a layer NAME they are the integers `NAME.q` `[out, in]` and the scales `NAME.scale` `[out, groups]`, or
    `NAME.weight` if their product (`weight_of`) is not exactly the weight.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for name, layer in block.named_modules():
        scale, weight = getattr(layer, "scale", None), getattr(layer, "weight", None)
        if not isinstance(scale, torch.Tensor) or weight is None:
            continue
        weight = weight.detach()
        scale_on_device = scale.to(weight.device)
        if scale.dim() == 2 and weight.dim() == 2 and weight.shape[1] % scale.shape[1] == 0:
            q = (weight.float().view(*scale.shape, -1) / scale_on_device.float()[..., None]).round().view(weight.shape)
            dtype = torch.int8 if float(q.abs().max()) < 128 else torch.int16
            if torch.equal(weight_of(q.to(dtype), scale_on_device, weight.dtype), weight):
                tensors[f"{name}.q"], tensors[f"{name}.scale"] = q.to(dtype), scale.contiguous()
                continue
        tensors[f"{name}.weight"] = weight.contiguous()
    return tensors


def weight_of(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute the weight from integers `[out, in]` and scales `[out, groups]`, in float32 as auto-round does."""
    return (q.float().view(*scale.shape, -1) * scale.float()[..., None]).view(q.shape).to(dtype)


def drop_unusable_blocks(folder: Path) -> None:
    """Remove the blocks that cannot be resumed from each manifest: the first one without a file, and all after it.

    A killed machine can leave a manifest in the store that names more blocks than there are files: it uploaded the
    manifest but not the new index of files, or a block ended after the files were listed.
    """
    from requant.tasks.checkpoint.writer import write_json

    for path in folder.glob(f"group_*/{MANIFEST}"):
        manifest, done = _resumable(path)
        if not done:
            path.unlink()
        elif done != manifest["completed_blocks"]:
            write_json(path.parent, path.name, {**manifest, "completed_blocks": done})


def count_finished(folder: Path) -> int:
    """Count the finished blocks in a work folder, after which a run can continue."""
    return sum(len(_resumable(path)[1]) for path in folder.glob(f"resume/group_*/{MANIFEST}"))


def _resumable(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a manifest. Returns it, or {} if it cannot be read, and its blocks up to the first one without a file."""
    try:
        manifest = json.loads(path.read_text())
        blocks = list(manifest["completed_blocks"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}, []
    usable = itertools.takewhile(lambda i: block_file(path.parent, i).exists(), range(len(blocks)))
    return manifest, [blocks[i] for i in usable]


def portable_files(folder: Path) -> list[str]:
    """List the files of a work folder that another machine needs to continue, the manifests last.

    Of the packed files, only those that are older than the manifest are listed: they were complete when their block was
    marked as done.
    """
    manifests = sorted(folder.glob(f"resume/group_*/{MANIFEST}"))
    if not manifests:
        return []
    newest = max(path.stat().st_mtime_ns for path in manifests)
    files = [*folder.glob("out/*/model-shard-*.safetensors"), *folder.glob("resume/group_*/block-*.safetensors")]
    complete = sorted(path for path in files if path.stat().st_mtime_ns <= newest)
    ladder = [path for path in (folder / "ladder.json",) if path.exists()]
    return [path.relative_to(folder).as_posix() for path in [*complete, *ladder, *manifests]]


def worth_fetching(folder: Path, paths: list[str]) -> bool:
    """Check whether the files that the store offers hold more finished blocks than the folder.

    If they do, the folder's own resume state is deleted, to make room for them.
    """
    offered = sum(Path(path).name.startswith("block-") for path in paths)
    if offered <= count_finished(folder):
        return False
    for name in ("out", "resume"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "ladder.json").unlink(missing_ok=True)
    return True


def pass_through(orchestrator: Any, model: Any, inputs: Any, names: list[str], folder: Path) -> tuple[Any, Any]:
    """Compute the inputs of the block after the finished blocks `names`, by passing the samples through these.

    Returns the outputs of the quantized blocks, None if auto-round does not use them, and the outputs of the base's
    blocks. The passes and their batches are the same as when the blocks were tuned (`compress_block`, auto-round
    0.16.1).
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
