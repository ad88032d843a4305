"""Compare what the stages of a run need with what this machine has.

A stage is stopped only where the shortage is certain. The other estimates are rough, so a machine below them is warned
of and not refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from requant.tasks.formatting import gigabytes
from requant.tasks.hardware import Gpu, total_memory_bytes, visible_gpus
from requant.tasks.planning.document import Needs
from requant.tasks.planning.findings import Findings
from requant.tasks.planning.output import CheckpointPlan
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.settings import read_settings

# Stages that compute with torch in Requant's own process, on one GPU.
ON_ONE_GPU = ("quantize", "validate")
# Stages that hold all weights of one model on the GPUs, shared among them where an engine is told to.
ON_ALL_GPUS = ("self_calibration", "benchmark", "acceptance", "probe")
# Bytes per weight that tuning a block cannot do without: the weight in BF16, its rounding and the gradient in float32.
LEAST_TUNED_BYTES, LEAST_ROUNDED_BYTES = 2 + 4 + 4, 2


@dataclass(frozen=True)
class Here:
    """This machine: its memory, and its GPUs. None: not known, as nvidia-smi does not list GPUs of other makers."""

    memory_bytes: int
    gpus: tuple[Gpu, ...] | None

    @classmethod
    def look(cls) -> Here:
        return cls(total_memory_bytes(), visible_gpus())

    def uses_cpu(self, recipe: Recipe) -> bool:
        """Check whether a run of this recipe here would compute on the CPU."""
        return recipe.quantize.device == "cpu" or (recipe.quantize.device == "auto" and self.gpus == ())


def as_estimated(recipe: Recipe, here: Here | None, delegated: Collection[str]) -> Recipe:
    """Return the recipe by which time and memory are estimated: on a CPU if the run would be on this one's.

    `here` is None for a run elsewhere. A GPU that the recipe names in `hardware` counts as the one of the run.
    """
    if here is None or _named_gpu(recipe) or "quantize" in delegated or not here.uses_cpu(recipe):
        return recipe
    return recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"device": "cpu"})})


def _named_gpu(recipe: Recipe) -> str | None:
    """Return the GPU that the recipe is planned for, if it names one."""
    named = recipe.hardware.gpu if recipe.hardware else None
    return None if named == "cpu" else named


def machine_findings(here: Here, recipe: Recipe, output: CheckpointPlan, needs: Needs, stages: list[str]) -> Findings:
    """Say what this machine lacks for the `stages`, which are in the order of a run. The disk is not looked at."""
    computing = [stage for stage in stages if stage in (*ON_ONE_GPU, *ON_ALL_GPUS) and stage in needs.stages]
    found = _presence(here, recipe, computing)
    for stage in computing:
        found += Findings.of(stage, warnings=_memory(here, stage, needs))
        if here.gpus and not here.uses_cpu(recipe):
            found += Findings.of(stage, warnings=_gpu_memory(here.gpus, stage, needs))
    if "quantize" in computing:
        found += Findings.of("quantize", _certain_shortage(here, recipe, output))
    return found


def _presence(here: Here, recipe: Recipe, computing: list[str]) -> Findings:
    device = recipe.quantize.device
    if not computing or device == "cpu":
        return Findings()
    if here.gpus is None:
        seen = "not checked: whether a GPU is there and has enough memory, as there is no nvidia-smi that lists it"
        return Findings.of(computing[0], warnings=[seen])
    if not here.gpus and device != "auto":
        return Findings.of(
            computing[0], [f"quantize.device is {device}, and this machine has no GPU: set it to cpu, or run elsewhere"]
        )
    if not here.gpus:
        if recipe.hardware is not None and recipe.hardware.gpu == "cpu":
            return Findings()
        named = f"hardware.gpu is {gpu}, and " if (gpu := _named_gpu(recipe)) else ""
        lacking = f"{named}this machine has no GPU: the CPU would be used"
        return Findings.of(computing[0], warnings=[lacking])
    number = int(device.partition(":")[2] or 0)
    if device != "auto" and number >= len(here.gpus):
        return Findings.of(
            computing[0], [f"quantize.device is {device}, and this machine has {len(here.gpus)} GPUs: correct it"]
        )
    return Findings()


def _memory(here: Here, stage: str, needs: Needs) -> Iterator[str]:
    needed, has = needs.stages[stage].ram_bytes or 0, here.memory_bytes
    if needed > has:
        yield f"may take up to {gigabytes(needed)} of memory, and this machine has {gigabytes(has)}"


def _gpu_memory(gpus: tuple[Gpu, ...], stage: str, needs: Needs) -> Iterator[str]:
    if stage in ON_ONE_GPU:
        has, whose = _largest_bytes(gpus), "the largest GPU here has"
    else:
        has, whose = sum(gpu.memory_bytes for gpu in gpus), "the GPUs here have"
    needed = needs.stages[stage].low_vram_bytes or 0
    if needed > has:
        tuned = "; smaller batches need less, and are slower" if stage == "quantize" else ""
        yield f"may take {gigabytes(needed)} of GPU memory, and {whose} {gigabytes(has)}{tuned}"


def _largest_bytes(gpus: tuple[Gpu, ...]) -> int:
    """Return the memory of the largest GPU, or what REQUANT_GPU_GB leaves of it."""
    limit_gb = read_settings().gpu_gb
    return int(min(max(gpu.memory_bytes for gpu in gpus), math.inf if limit_gb is None else limit_gb * 1e9))


def _certain_shortage(here: Here, recipe: Recipe, output: CheckpointPlan) -> Iterator[str]:
    """Say that the largest block alone is too much, however small batches and wherever samples and activations are."""
    weights = max(output.block_parameters.values(), default=0)
    least = weights * (LEAST_TUNED_BYTES if recipe.quantize.iters else LEAST_ROUNDED_BYTES)
    if here.uses_cpu(recipe):
        has, what = here.memory_bytes, "memory"
    elif here.gpus:
        has, what = _largest_bytes(here.gpus), "GPU memory"
    else:
        return
    if least > has:
        yield (
            f"the largest block takes {gigabytes(least)} of {what} at least, and this machine has {gigabytes(has)}: "
            "use a larger one"
        )
