"""Estimate how much disk, memory and GPU memory each stage of a run needs."""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

from requant.tasks.checkpoint.blocks import block_sizes, streaming_parameters
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.fp8 import is_fp8
from requant.tasks.formatting import gigabytes
from requant.tasks.planning.document import Needs, StageNeeds
from requant.tasks.planning.measuring import measured_tokens
from requant.tasks.planning.merging import PlannedMerge
from requant.tasks.planning.output import CheckpointPlan
from requant.tasks.quantizing.auto_settings import NEXT_BLOCK_BYTES, ROUTED, sample_bytes, step_bytes
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.validating import PROBE

# Bytes per weight of a block in memory: its rounded and its packed weights while they are written, and split experts.
WRITTEN_BYTES, SPLIT_BYTES = 2, 2
RUNTIME_BYTES = 3_000_000_000  # memory that Python, torch, CUDA and Prefect take before any weight is loaded


def estimate_needs(
    output: CheckpointPlan,
    recipe: Recipe,
    missing_bytes: int,
    to_run: Collection[str],
    *,
    kept_bytes: int = 0,
    merge: PlannedMerge | None = None,
) -> Needs:
    """Estimate what the stages `to_run` need.

    `missing_bytes` counts the part of the base that is not on this machine, and `kept_bytes` what earlier outputs of
    the same run leave on it. `merge` is that of an adapter.
    """
    stages: dict[str, StageNeeds] = {}
    if not set(to_run) - {"publish"}:
        return Needs.of(stages)
    if missing_bytes:
        stages["download"] = StageNeeds(disk_bytes=missing_bytes)
    if merge is not None and "merge" in to_run:
        stages["merge"] = _same_in_low_memory(RUNTIME_BYTES + merge.ram_bytes, 0, merge.size_bytes)
    if "self_calibration" in to_run:
        weights, on_cpu = output.base.nbytes, recipe.quantize.device == "cpu"
        # On a CPU, transformers computes in float32.
        ram_bytes = RUNTIME_BYTES + (2 * weights if on_cpu else weights)
        stages["self_calibration"] = _same_in_low_memory(ram_bytes, 0 if on_cpu else weights)
    if "quantize" in to_run:
        stages["quantize"] = _quantize(output, recipe)
    if "mtp_fix" in to_run and output.head_bytes:
        stages["mtp_fix"] = StageNeeds(disk_bytes=output.head_bytes)
    if "validate" in to_run:
        stages["validate"] = _validate(output, measured_tokens(recipe), on_cpu=recipe.quantize.device == "cpu")
    if "benchmark" in to_run and recipe.benchmark.engine != "none":
        weights = sum(output.weights.values())
        stages["benchmark"] = _same_in_low_memory(RUNTIME_BYTES + weights, weights)
    # A result's base is served here too, by acceptance unless a server has it.
    serve_base = {"probe"} if recipe.benchmark.base_engine else {"acceptance", "probe"}
    for stage in sorted(serve_base & {*to_run}):
        stages[stage] = _same_in_low_memory(RUNTIME_BYTES + output.base.nbytes, output.base.nbytes)
    return Needs.of(stages, kept_bytes)


def disk_problem(needed: int, folder: Path) -> str | None:
    """Say in a sentence that less than `needed` bytes are free below `folder`; None if there is enough room.

    The work folders of an interrupted run count as free, since the next run continues in them.
    """
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free + sum(map(_own_bytes, (folder / "work").rglob("*")))
    if needed <= free:
        return None
    return (
        f"the run needs {gigabytes(needed)} of disk below {folder}, and {gigabytes(free)} are free: "
        "free disk space there, or set REQUANT_STORE and XDG_CACHE_HOME to a larger disk"
    )


def _own_bytes(path: Path) -> int:
    """Count the bytes of disk that deleting a file would free: none for a link, or a file that is gone."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return 512 * status.st_blocks
    return 0


def _quantize(output: CheckpointPlan, recipe: Recipe) -> StageNeeds:
    """Estimate quantize: one block and its samples on the GPU (or in memory with low_gpu_mem).

    The base's weights are pages of its files. They need no memory of their own: each block is read once. In memory are
    the packed and the rounded weights of the block that is being written, and the experts of one block, split.
    """
    base, asked = output.base, recipe.quantize
    hidden = _config_size(base, "hidden_size")
    width = hidden + (_config_size(base, "intermediate_size") or 4 * hidden)
    routed = any(word in name.lower() for name in base.tensors for word in ROUTED)
    largest = max(block_sizes(base).values(), default=0)
    on_cpu = recipe.quantize.device == "cpu"
    compiled = not (routed or on_cpu or asked.torch_compile is False)
    step = step_bytes(asked.batch_size * asked.seqlen, largest, width, compiled)
    samples = sample_bytes(asked.nsamples * asked.seqlen, hidden)
    disk_bytes = _quantize_disk(output)
    ram_bytes = RUNTIME_BYTES + largest * (WRITTEN_BYTES + (SPLIT_BYTES if routed else 0))
    if on_cpu:
        return _same_in_low_memory(ram_bytes + samples + step, 0, disk_bytes)
    return StageNeeds(
        disk_bytes=disk_bytes,
        ram_bytes=ram_bytes,
        vram_bytes=samples + step + largest * NEXT_BLOCK_BYTES,
        low_ram_bytes=ram_bytes + samples,
        low_vram_bytes=step,
    )


def _quantize_disk(output: CheckpointPlan) -> int:
    """Add up the packed layers with a head, the resume state, the assembled files, and a BF16 copy of an FP8 base.

    The resume state has one byte per quantized weight.
    """
    assembled = sum(output.before_head.values())
    packed = sum(t.nbytes for name, t in output.checkpoint.tensors.items() if name not in output.base.tensors)
    dequantized = output.base.nbytes if is_fp8(output.source.tensors.values()) else 0
    return packed + output.head_bytes + output.quantized_parameters + assembled + dequantized


def _states_bytes(output: CheckpointPlan, tokens: int) -> int:
    """Count the bytes of the hidden states of one model after a block, in float32 at most."""
    return 4 * _config_size(output.base, "hidden_size") * tokens


def _measurement_bytes(output: CheckpointPlan, tokens: int) -> int:
    """Count the bytes of both measurements, of the base and of the result: the hidden states, and the other values."""
    probes = (len(block_sizes(output.base)) + 2) * PROBE
    return 2 * (_states_bytes(output, tokens + probes) + 32 * tokens)


def _validate(output: CheckpointPlan, tokens: int, *, on_cpu: bool) -> StageNeeds:
    """Estimate validate, which computes one block at a time: in BF16 on a GPU, in float32 on a CPU.

    While one block is computed, there are the hidden states of all tokens before and after it. A GPU gets the weights
    of a block and of the next one by way of the memory.
    """
    parameters, states = streaming_parameters(output.base), _states_bytes(output, tokens)
    disk_bytes, ram_bytes = _measurement_bytes(output, tokens), RUNTIME_BYTES + 2 * states
    if on_cpu:
        return _same_in_low_memory(ram_bytes + 4 * parameters, 0, disk_bytes)
    read_bytes = 2 * 2 * max(block_sizes(output.base).values(), default=0)
    return _same_in_low_memory(ram_bytes + read_bytes, 2 * parameters + states, disk_bytes)


def _same_in_low_memory(ram_bytes: int, vram_bytes: int, disk_bytes: int | None = None) -> StageNeeds:
    """Return the needs of a stage that do not depend on `quantize.low_gpu_mem`."""
    return StageNeeds(
        disk_bytes=disk_bytes,
        ram_bytes=ram_bytes,
        vram_bytes=vram_bytes,
        low_ram_bytes=ram_bytes,
        low_vram_bytes=vram_bytes,
    )


def _config_size(base: Checkpoint, key: str) -> int:
    """Read a size from the config of the text model; 0 if it has none."""
    value = base.text_config.get(key)
    return value if type(value) is int and value > 0 else 0
