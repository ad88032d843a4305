"""What the process that quantizes is asked to do (job.json), and what it has done (result.json)."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from requant.tasks.quantizing.events import SettingsChosen
from requant.tasks.quantizing.samples import SampleSource, SourceUse
from requant.tasks.recipe.quantize_section import AutoOrBool, Quantize


class Rung(BaseModel):
    """The settings that decide how much memory tuning takes: a rung of the ladder in memory_fallback.py.

    Each optimizer step uses `batch_size * gradient_accumulate_steps` samples, `batch_size` of them at a time.
    `low_gpu_mem` keeps all samples in the CPU's memory, `offload` also the activations of a step.
    """

    model_config = ConfigDict(frozen=True)

    batch_size: int
    gradient_accumulate_steps: int
    low_gpu_mem: AutoOrBool
    torch_compile: AutoOrBool
    offload: bool = False

    @classmethod
    def asked(cls, settings: Quantize) -> Rung:
        """Return the first rung: what the recipe asks for."""
        return cls(
            batch_size=settings.batch_size,
            gradient_accumulate_steps=1,
            low_gpu_mem=settings.low_gpu_mem,
            torch_compile=settings.torch_compile,
        )


class Job(BaseModel):
    """All that the process needs to know. Where `rung` and `settings` have the same field, `rung` counts."""

    model_config = ConfigDict(frozen=True)

    settings: Quantize  # with a number as its group size
    rung: Rung
    model: Path  # a folder with the checkpoint to quantize
    sources: list[SampleSource]  # the calibration texts
    head: list[str]  # the name prefixes of the MTP head's modules, which stay as they are
    allow_remote_code: bool


class JobResult(BaseModel):
    """What was done: where the checkpoint is, the settings of the last process, and the bits of each module."""

    model_config = ConfigDict(frozen=True)

    checkpoint: Path
    settings: SettingsChosen
    bits: dict[str, int]
    peak_gpu_bytes: int | None
    calibration: list[SourceUse] = []  # what was taken from each source
