"""What a run takes of disk, memory and GPU memory, stage by stage."""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.blocks import block_sizes, streaming_parameters
from requant.tasks.checkpoint.fp8 import is_fp8
from requant.tasks.formatting import gigabytes
from requant.tasks.planning.document import Needs, StageNeeds
from requant.tasks.planning.output import PlannedOutput, head_bytes
from requant.tasks.quantizing.auto_settings import ROUTED, sample_bytes, step_bytes
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.validating import LENGTH, PROBE, WINDOWS

RUNTIME = 3_000_000_000  # bytes of memory that Python, torch, CUDA and Prefect take before any weight


def needs(output: PlannedOutput, recipe: Recipe, missing: int, to_run: Collection[str], *, kept: int = 0) -> Needs:
    """Foretell what the stages `to_run` take. missing: bytes of the base that are not on this machine; kept: bytes
    that the outputs before this one leave there."""
    stages: dict[str, StageNeeds] = {}
    if not set(to_run) - {"publish"}:
        return Needs.of(stages)
    if missing:
        stages["download"] = StageNeeds(disk_bytes=missing)
    if "quantize" in to_run:
        stages["quantize"] = _quantize(output, recipe)
    if "mtp_fix" in to_run and head_bytes(output):
        stages["mtp_fix"] = StageNeeds(disk_bytes=head_bytes(output))
    if "validate" in to_run:
        stages["validate"] = _validate(output)
    if "benchmark" in to_run and recipe.benchmark.engine != "none":
        weights = sum(output.weights.values())
        stages["benchmark"] = _same_in_low_memory(RUNTIME + weights, weights)
    return Needs.of(stages, kept)


def disk_problem(needed: int, folder: Path) -> str | None:
    """What is wrong if that much is not free where the store works on this machine. What an interrupted run has left
    in its work folders counts as free: the next one goes on from it."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free + sum(map(_own_bytes, (folder / "work").rglob("*")))
    if needed <= free:
        return None
    return (
        f"the run needs {gigabytes(needed)} of disk below {folder}, and {gigabytes(free)} are free: "
        "free disk space there, or set REQUANT_STORE and XDG_CACHE_HOME to a larger disk"
    )


def _own_bytes(path: Path) -> int:
    """Bytes that a file takes for itself: none if it is a link, or gone by now."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return 512 * status.st_blocks
    return 0


def _quantize(output: PlannedOutput, recipe: Recipe) -> StageNeeds:
    """Count the model in memory, a block and its samples on the GPU; in low-memory mode the samples in memory too."""
    base, job = output.base, recipe.quantize.model_dump()
    head = set(base.head.names if base.head else ())
    model = sum(tensor.nbytes for name, tensor in base.tensors.items() if name not in head)
    hidden = _number(base.text_config, "hidden_size")
    width = hidden + (_number(base.text_config, "intermediate_size") or 4 * hidden)
    routed = any(word in name.lower() for name in base.tensors for word in ROUTED)
    largest = max(block_sizes(base).values(), default=0)
    on_cpu = recipe.quantize.device == "cpu"
    step = step_bytes(job, largest, width, not (routed or on_cpu or recipe.quantize.torch_compile is False))
    samples = sample_bytes(job, hidden)
    disk_bytes = _quantize_disk(output, recipe)
    if on_cpu:
        return _same_in_low_memory(RUNTIME + model + samples + step, 0, disk_bytes)
    return StageNeeds(
        disk_bytes=disk_bytes,
        ram_bytes=RUNTIME + model,
        vram_bytes=samples + step,
        low_ram_bytes=RUNTIME + model + samples,
        low_vram_bytes=step,
    )


def _quantize_disk(output: PlannedOutput, recipe: Recipe) -> int:
    """Add up auto-round's own output, its resume state (a byte a packed weight) and the assembled files; of an FP8
    base a BF16 copy. On a CPU auto-round writes what it does not pack as F32."""
    made = sum(output.before_head.values())
    kept = sum(t.nbytes for name, t in output.checkpoint.tensors.items() if name in output.base.tensors)
    plain = output.base.nbytes if is_fp8(output.source.tensors.values()) else 0
    again = kept if recipe.quantize.device in {"cpu", "auto"} else 0
    return made + again + output.packed_parameters + made + plain


def _measured(output: PlannedOutput) -> int:
    """Count the bytes that are kept of base and result each: hidden states in float32 at most, and some numbers beside
    each token."""
    states = WINDOWS * LENGTH + (len(block_sizes(output.base)) + 2) * PROBE
    return 2 * (4 * _number(output.base.text_config, "hidden_size") * states + 32 * WINDOWS * LENGTH)


def _validate(output: PlannedOutput) -> StageNeeds:
    """Count base and result as they pass through one block at a time, in BF16 on a GPU and float32 on a CPU."""
    parameters = streaming_parameters(output.base)
    return _same_in_low_memory(RUNTIME + 4 * parameters, 2 * parameters, _measured(output))


def _same_in_low_memory(ram_bytes: int, vram_bytes: int, disk_bytes: int | None = None) -> StageNeeds:
    """Give the needs of a stage that `quantize.low_gpu_mem` does not change."""
    return StageNeeds(
        disk_bytes=disk_bytes,
        ram_bytes=ram_bytes,
        vram_bytes=vram_bytes,
        low_ram_bytes=ram_bytes,
        low_vram_bytes=vram_bytes,
    )


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if type(value) is int and value > 0 else 0
