"""Estimate how long stages take, and say what each estimate is based on.

The best source is an earlier run on the same hardware, whose record is in the store. Without one, an estimate of
quantize on a GPU uses blocks with the dimensions of a 27 B model that were measured, or auto-round's own table for
another GPU. For a CPU and for all other stages, a speed is assumed, and the estimate says so.

h200-figures.json was measured with a base of four blocks of that size, and gpu-figures.json by `make bench-gpu`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Literal, NamedTuple

from pydantic import AliasPath, BaseModel, Field

from requant.tasks.planning.measuring import WHOLE_TEXT_TOKENS, measured_tokens
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.record import StageRecord, TuningWork
from requant.tasks.store import Store

MAX_RECORDS = 200  # per stage
# Ignore runs this many times smaller: their time is mostly fixed overhead.
MAX_SIZE_RATIO = 100
# auto-round's README, W4A16 with its default recipe on an A100 with 80 GB: (parameters, minutes, with low_gpu_mem).
TABLE = ((8e9, 12, 19), (14e9, 23, 33), (70e9, 120, 140))
TABLE_GPU = "A100 80GB"
TABLE_WORK = TuningWork(parameters=1, iters=200, nsamples=128, seqlen=2048, batch_size=8)
# Assumed throughput without a record, and the fixed time to import torch or start an engine twice.
ASSUMED_BYTES_PER_S = {
    "download": 100e6, "merge": 100e6, "mtp_fix": 200e6, "validate": 100e6, "benchmark": 25e6, "acceptance": 100e6,
    "probe": 50e6, "publish": 50e6,
}  # fmt: skip
# 27 B dimensions took 186 s on an H200, of which the plan takes 96 s for something else (docs/explanation/gates.md).
VALIDATED_BYTES_PER_S_ON_GPU = 800e6
ASSUMED_CPU_FLOPS, ASSUMED_GPU_FLOPS = 500e9, 100e12
# The base's weights are read once for every token of the rows that are written at once.
ASSUMED_ROWS_AT_ONCE = 32
ASSUMED_WEIGHTS_BYTES_PER_S = {"cpu": 10e9, "gpu": 1e12}
FIXED_SECONDS = {
    "merge": 5.0, "self_calibration": 60.0, "quantize": 10.0, "validate": 10.0, "benchmark": 60.0, "acceptance": 60.0,
    "probe": 60.0,
}  # fmt: skip

BlockKind = Literal["linear", "full"]  # kind of attention
FIGURES = ("h200-figures.json", "gpu-figures.json")  # the first one counts where no GPU is named


@dataclass(frozen=True)
class Estimate:
    """An estimate in seconds, and in words what it is based on."""

    seconds: float
    source: str


class MeasuredBlock(BaseModel):
    """Seconds for the first block of a kind (with compilation) and for each later one.

    `fixed_seconds` is the part of the latter that does not depend on the iterations: the passes over all samples, and
    the start and end of a block. 0 if only one number of iterations was measured.
    """

    cold_seconds: float
    steady_seconds: float
    fixed_seconds: float = 0.0


class ModelSize(BaseModel):
    """The dimensions of the model whose blocks were measured, and the settings of the tuning."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    key_heads: int
    value_heads: int
    linear_dim: int
    iters: int
    nsamples: int
    seqlen: int
    batch_size: int

    def work(self, kind: BlockKind) -> TuningWork:
        """Return the work of one block: the quantized matrices of its attention and of its MLP."""
        if kind == "full":
            # Per head, q_proj has queries and an output gate, and o_proj is as large as the queries. Per KV head there
            # are k_proj and v_proj.
            attention = self.head_dim * (3 * self.heads + 2 * self.kv_heads)
        else:
            # Per key head, in_proj_qkv has queries and keys. Per value head it has values, and in_proj_z and out_proj
            # are as large as the values.
            attention = self.linear_dim * (2 * self.key_heads + 3 * self.value_heads)
        mlp = 3 * self.intermediate  # gate_proj, up_proj, down_proj
        return TuningWork(
            parameters=self.hidden * (mlp + attention),
            iters=self.iters,
            nsamples=self.nsamples,
            seqlen=self.seqlen,
            batch_size=self.batch_size,
        )


class GpuFigures(BaseModel):
    """The part of a file with figures that estimates read.

    `blocks` has the measured blocks by kind, and by the tuning loop that was measured: `requant` or `auto-round`.
    `around_seconds` is the time before the first block and after the last one.
    """

    date: str
    gpu: str = Field(validation_alias=AliasPath("card", "name"))
    model: ModelSize = Field(validation_alias=AliasPath("model", "size"))
    blocks: dict[BlockKind, dict[str, MeasuredBlock]]
    around_seconds: float = 0.0


class TimedRecord(NamedTuple):
    """A record that says how long its stage took."""

    record: StageRecord
    seconds: float


@cache
def gpu_figures() -> list[GpuFigures]:
    """Read the measured figures."""
    folder = resources.files("requant.tasks.planning")
    return [GpuFigures.model_validate_json(folder.joinpath(name).read_text()) for name in FIGURES]


def effort(work: TuningWork) -> float:
    """Return weights x tokens, a tuned token counting three times (forward plus a backward twice as dear).

    A sample passes through each block twice without tuning.
    """
    return tuning_effort(work) + passing_effort(work)


def tuning_effort(work: TuningWork) -> float:
    """Return the part of the effort that depends on the iterations."""
    return work.parameters * work.seqlen * 3 * work.iters * work.batch_size


def passing_effort(work: TuningWork) -> float:
    """Return the part of the effort that does not depend on the iterations."""
    return work.parameters * work.seqlen * 2 * work.nsamples


def estimate_quantize(
    store: Store, recipe: Recipe, weights_per_block: Mapping[str, int], linear_attention_blocks: set[str]
) -> Estimate:
    """Estimate the quantize stage from the number of quantized weights in each decoder block."""
    settings, hardware = recipe.quantize, requested_hardware(recipe)
    work = TuningWork(
        parameters=sum(weights_per_block.values()),
        iters=settings.iters,
        nsamples=settings.nsamples,
        seqlen=settings.seqlen,
        batch_size=settings.batch_size,
        fast=settings.fast,
    )
    earlier = _nearest_quantize(records(store, "quantize", hardware), work, small_too=hardware == "cpu")
    if earlier is not None:
        return earlier
    if hardware == "cpu":
        seconds = FIXED_SECONDS["quantize"] + 2 * effort(work) / ASSUMED_CPU_FLOPS  # a product and a sum per weight
        return Estimate(seconds, f"assumed: a CPU with {ASSUMED_CPU_FLOPS / 1e9:.0f} GFLOP/s")
    loop = "auto-round" if settings.fast is False else "requant"
    for figures in gpu_figures():
        if loop in figures.blocks["full"] and (hardware is None or _is_named(hardware, figures.gpu)):
            weights = sum(count for block, count in weights_per_block.items() if block in linear_attention_blocks)
            seconds = figures.around_seconds
            seconds += _block_seconds(figures, "linear", loop, replace(work, parameters=weights))
            seconds += _block_seconds(figures, "full", loop, replace(work, parameters=work.parameters - weights))
            return Estimate(seconds, f"blocks of 27 B dimensions measured on {figures.gpu}, {figures.date}")
    minutes = _table_minutes(work.parameters, low_gpu_mem=settings.low_gpu_mem is True)
    scale = effort(replace(work, parameters=1)) / effort(TABLE_WORK)
    return Estimate(60 * minutes * scale, f"auto-round's table for {TABLE_GPU}: nothing was measured on {hardware} yet")


def _nearest_quantize(runs: Iterable[TimedRecord], work: TuningWork, *, small_too: bool) -> Estimate | None:
    """Scale the run whose effort is nearest to that of `work`; None without a suitable run.

    `small_too`: also use runs that are more than MAX_SIZE_RATIO times smaller. For a CPU they beat an assumption.
    """
    asked = effort(work)
    efforts = [
        (run, effort(done))
        for run in runs
        if (done := run.record.work) is not None and done.fast == work.fast and run.record.block_seconds
    ]
    # A record is untrusted: its effort can be zero, negative, or too large for a float.
    efforts = [(run, size) for run, size in efforts if size > 0 and (small_too or asked <= MAX_SIZE_RATIO * size)]
    if not efforts or asked <= 0:
        return None
    run, nearest = min(efforts, key=lambda pair: abs(math.log(asked) - math.log(pair[1])))
    done = run.record.work
    steps = run.record.step_seconds
    if done is not None and steps and done.iters > 0 and done.nsamples > 0:
        tuning = done.iters * sum(steps)
        passing = sum(run.record.block_seconds) - run.record.compile_seconds - tuning
        around = run.seconds - sum(run.record.block_seconds) + run.record.compile_seconds
        seconds = max(0.0, around) + tuning * (tuning_effort(work) / tuning_effort(done))
        seconds += max(0.0, passing) * (passing_effort(work) / passing_effort(done))
        return Estimate(seconds, _earlier_run(run.record))
    steady = statistics.median(run.record.block_seconds) * len(run.record.block_seconds)
    fixed = max(0.0, run.seconds - steady)
    return Estimate(fixed + steady * (asked / nearest), _earlier_run(run.record))


def estimate_stage(store: Store, stage: str, recipe: Recipe, size_bytes: int) -> Estimate:
    """Estimate a stage other than quantize, which moves or reads `size_bytes`. Validate also follows its tokens."""
    tokens = measured_tokens(recipe) if stage == "validate" else WHOLE_TEXT_TOKENS
    engine = recipe.benchmark.engine if stage == "benchmark" else None
    if engine == "none":
        return Estimate(0.0, "nothing is measured")
    runs = [
        run
        for run in records(store, stage, requested_hardware(recipe))
        if run.seconds and 0 < size_bytes <= MAX_SIZE_RATIO * run.record.bytes_processed
    ]
    if engine is not None:
        runs = [r for r in runs if r.record.engine == engine or (engine == "auto" and r.record.engine != "none")]
    if runs:
        nearest = min(runs, key=lambda run: abs(run.record.bytes_processed - size_bytes))
        # How much of the run's time was fixed is unknown. So a smaller size is not estimated to take less.
        scale = max(1.0, size_bytes / nearest.record.bytes_processed)
        scale *= max(1.0, tokens / (nearest.record.measured_tokens or tokens))
        return Estimate(nearest.seconds * scale, _earlier_run(nearest.record))
    on_cpu = requested_hardware(recipe) == "cpu"
    rate = VALIDATED_BYTES_PER_S_ON_GPU if stage == "validate" and not on_cpu else ASSUMED_BYTES_PER_S[stage]
    seconds = FIXED_SECONDS.get(stage, 0.0) + size_bytes / rate
    source = f"assumed: {rate / 1e6:.0f} MB/s"
    if stage == "validate":
        # A product and a sum per weight and token. In base and result together, a byte stands for about one weight.
        flops = ASSUMED_CPU_FLOPS if on_cpu else ASSUMED_GPU_FLOPS
        seconds += 2 * size_bytes * tokens / flops
        source += f", and {flops / 1e12:g} TFLOP/s for {tokens:,} tokens"
    return Estimate(seconds, source)


def estimate_writing(store: Store, recipe: Recipe, weights_bytes: int, tokens: int) -> Estimate:
    """Estimate the stage self_calibration, in which the base writes so many tokens."""
    hardware = requested_hardware(recipe)
    runs = [
        (run, run.record.bytes_processed * run.record.written_tokens)
        for run in records(store, "self_calibration", hardware)
        if run.record.written_tokens > 0 and run.record.bytes_processed > 0
    ]
    if runs:
        run, effort_then = min(runs, key=lambda pair: abs(math.log(weights_bytes * tokens) - math.log(pair[1])))
        return Estimate(run.seconds * max(1.0, weights_bytes * tokens / effort_then), _earlier_run(run.record))
    rate = ASSUMED_WEIGHTS_BYTES_PER_S["cpu" if hardware == "cpu" else "gpu"]
    seconds = FIXED_SECONDS["self_calibration"] + weights_bytes * tokens / ASSUMED_ROWS_AT_ONCE / rate
    return Estimate(seconds, f"assumed: {ASSUMED_ROWS_AT_ONCE} rows at once, weights read at {rate / 1e9:,.0f} GB/s")


def requested_hardware(recipe: Recipe) -> str | None:
    """Return the hardware that the recipe names: a GPU, or `cpu`. None stands for any."""
    if recipe.hardware is not None and recipe.hardware.gpu is not None:
        return recipe.hardware.gpu
    return "cpu" if recipe.quantize.device == "cpu" else None


def records(store: Store, stage: str, hardware: str | None) -> list[TimedRecord]:
    """Read the records of a stage on this hardware, the newest first. `hardware` is None for any hardware."""
    runs = [TimedRecord(r, r.seconds) for r in store.records(stage, MAX_RECORDS).values() if r.seconds is not None]
    runs = [run for run in runs if hardware is None or _is_named(hardware, device_of(run.record))]
    return sorted(runs, key=lambda run: run.record.started, reverse=True)


def device_of(record: StageRecord) -> str:
    """Return what a stage ran on: its GPU by name, or `cpu`."""
    return record.device or ", ".join(record.machine.gpus) or "cpu"


def _earlier_run(record: StageRecord) -> str:
    return f"an earlier run on {device_of(record)}, {record.started[:10]}"


def _is_named(short_name: str, name: str) -> bool:
    """Check whether a GPU's name has all words of a shorter one: `H100` is an `NVIDIA H100 80GB HBM3`."""
    words = name.lower().split()
    return all(word in words for word in short_name.lower().split())


def _block_seconds(figures: GpuFigures, kind: BlockKind, loop: str, work: TuningWork) -> float:
    """Estimate all blocks of one kind: one cold start, and the rest in proportion to weights and tokens.

    The part that does not depend on the iterations is scaled by itself, where it is known.
    """
    if not work.parameters:
        return 0.0
    measured, reference = figures.blocks[kind][loop], figures.model.work(kind)
    seconds = measured.cold_seconds - measured.steady_seconds
    if not measured.fixed_seconds:
        return seconds + measured.steady_seconds * effort(work) / effort(reference)
    seconds += measured.fixed_seconds * passing_effort(work) / passing_effort(reference)
    tuning = measured.steady_seconds - measured.fixed_seconds
    return seconds + tuning * tuning_effort(work) / tuning_effort(reference)


def _table_minutes(parameters: float, *, low_gpu_mem: bool) -> float:
    """Read auto-round's table: linear between its rows, and in proportion to the nearest row beyond them."""
    rows = [(size, slow if low_gpu_mem else fast) for size, fast, slow in TABLE]
    for (small, least), (large, most) in pairwise(rows):
        if small <= parameters <= large:
            return least + (most - least) * (parameters - small) / (large - small)
    size, minutes = min(rows, key=lambda row: abs(row[0] - parameters))
    return minutes * parameters / size
