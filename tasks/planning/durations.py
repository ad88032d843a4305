"""Estimate how long stages take, and say what each estimate is based on.

The sources, the best first: earlier runs on the same hardware, whose records are in the store; blocks with the
dimensions of a 27 B model that were measured alone (gpu-figures.json, made by `make bench-gpu`); auto-round's own
table. Where there is none of these, a transfer rate is assumed, and the estimate says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel

from requant.tasks.recipe.recipe import Recipe
from requant.tasks.record import StageRecord, TuningWork
from requant.tasks.store import Store

MAX_RECORDS = 200  # per stage
# A run says nothing about one that is this many times larger: most of its time was spent on something else.
MAX_SIZE_RATIO = 100
# auto-round's README, W4A16 with its default recipe on an A100 with 80 GB: (parameters, minutes, with low_gpu_mem).
TABLE = ((8e9, 12, 19), (14e9, 23, 33), (70e9, 120, 140))
TABLE_GPU = "A100 80GB"
TABLE_WORK = TuningWork(parameters=1, iters=200, nsamples=128, seqlen=2048, batch_size=8)
# Without a record: the speed of a network, of a disk, or of weights that pass through both models; and the least time,
# in which torch is imported, or an engine starts twice and answers every prompt.
ASSUMED_BYTES_PER_S = {"download": 100e6, "mtp_fix": 200e6, "validate": 100e6, "benchmark": 25e6, "publish": 50e6}
MIN_STAGE_SECONDS = {"validate": 10.0, "benchmark": 60.0}

BlockKind = Literal["linear", "full"]  # its attention


@dataclass(frozen=True)
class Estimate:
    """An estimate in seconds, and in words what it is based on."""

    seconds: float
    source: str


class MeasuredBlock(BaseModel):
    """Seconds to tune one block: the first of its kind, with compilation, and any later one."""

    cold_seconds: float
    steady_seconds: float


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
        """Return the work of one block: the matrices of its attention and of its MLP."""
        if kind == "full":
            attention = self.head_dim * (3 * self.heads + 2 * self.kv_heads)
        else:
            attention = self.linear_dim * (2 * self.key_heads + 3 * self.value_heads)
        parameters = self.hidden * (3 * self.intermediate + attention)
        return TuningWork(parameters, self.iters, self.nsamples, self.seqlen, self.batch_size)


class MeasuredModel(BaseModel):
    size: ModelSize


class MeasuredCard(BaseModel):
    name: str


class MeasuredBlocks(BaseModel):
    """Measured blocks by kind, and by whose tuning loop it is: `requant` or `auto-round`."""

    blocks: dict[BlockKind, dict[str, MeasuredBlock]] = {}


class GpuFigures(MeasuredBlocks):
    """What of gpu-figures.json is used. `measured_again` takes the place of earlier measurements."""

    date: str
    card: MeasuredCard
    model: MeasuredModel
    measured_again: MeasuredBlocks = MeasuredBlocks()

    def block(self, kind: BlockKind, loop: str) -> MeasuredBlock:
        return {**self.blocks[kind], **self.measured_again.blocks.get(kind, {})}[loop]


@cache
def gpu_figures() -> GpuFigures:
    """Read gpu-figures.json."""
    text = resources.files("requant.tasks.planning").joinpath("gpu-figures.json").read_text()
    return GpuFigures.model_validate_json(text)


def effort(work: TuningWork) -> float:
    """Return the cost of tuning, in weights times tokens that pass forward through them.

    A token that is tuned on counts three times (forward, and twice as much backward). A sample passes through twice
    without tuning.
    """
    tuned = 3 * work.iters * work.batch_size
    return work.parameters * work.seqlen * (tuned + 2 * work.nsamples)


def estimate_quantize(store: Store, recipe: Recipe, blocks: Mapping[str, int], linear: set[str]) -> Estimate:
    """Estimate the quantize stage.

    `blocks` has the number of quantized weights by decoder block; `linear` names those with linear attention.
    """
    asked, gpu = recipe.quantize, requested_hardware(recipe)
    work = TuningWork(sum(blocks.values()), asked.iters, asked.nsamples, asked.seqlen, asked.batch_size, asked.fast)
    runs = [
        (record, record.work)
        for record in records(store, "quantize", gpu)
        if record.work and record.work.parameters and record.work.fast == asked.fast and record.block_seconds
    ]
    # Small runs count on a CPU, for which there is no other source.
    runs = [run for run in runs if effort(work) <= MAX_SIZE_RATIO * effort(run[1]) or gpu == "cpu"]
    if runs and effort(work):
        record, done = min(runs, key=lambda run: abs(math.log(effort(work) / effort(run[1]))))
        steady = statistics.median(record.block_seconds) * len(record.block_seconds)
        fixed = max(0.0, (record.seconds or 0.0) - steady)
        return Estimate(fixed + steady * effort(work) / effort(done), _earlier_run(record))
    figures = gpu_figures()
    if gpu is None or _is_named(gpu, figures.card.name):
        loop = "auto-round" if asked.fast is False else "requant"
        weights = sum(count for block, count in blocks.items() if block in linear)
        seconds = _block_seconds(figures, "linear", loop, replace(work, parameters=weights))
        seconds += _block_seconds(figures, "full", loop, replace(work, parameters=work.parameters - weights))
        return Estimate(seconds, f"blocks of 27 B dimensions measured on {figures.card.name}, {figures.date}")
    minutes = _table_minutes(work.parameters, low_gpu_mem=asked.low_gpu_mem is True)
    scale = effort(replace(work, parameters=1)) / effort(TABLE_WORK)
    return Estimate(60 * minutes * scale, f"auto-round's table for {TABLE_GPU}: nothing was measured on {gpu} yet")


def estimate_stage(store: Store, stage: str, recipe: Recipe, size_bytes: int) -> Estimate:
    """Estimate a stage other than quantize, which moves or reads `size_bytes`."""
    engine = recipe.benchmark.engine if stage == "benchmark" else None
    if engine == "none":
        return Estimate(0.0, "nothing is measured")
    runs = [
        record
        for record in records(store, stage, requested_hardware(recipe))
        if record.seconds and 0 < size_bytes <= MAX_SIZE_RATIO * record.bytes_processed
    ]
    if engine is not None:
        runs = [r for r in runs if r.engine == engine or (engine == "auto" and r.engine != "none")]
    if runs:
        nearest = min(runs, key=lambda record: abs(record.bytes_processed - size_bytes))
        seconds = (nearest.seconds or 0.0) * max(1.0, size_bytes / nearest.bytes_processed)
        return Estimate(seconds, _earlier_run(nearest))
    rate = ASSUMED_BYTES_PER_S[stage]
    return Estimate(MIN_STAGE_SECONDS.get(stage, 0.0) + size_bytes / rate, f"assumed: {rate / 1e6:.0f} MB/s")


def requested_hardware(recipe: Recipe) -> str | None:
    """Return the hardware that the recipe names: a GPU, or `cpu`. None stands for any."""
    if recipe.hardware is not None and recipe.hardware.gpu is not None:
        return recipe.hardware.gpu
    return "cpu" if recipe.quantize.device == "cpu" else None


def records(store: Store, stage: str, gpu: str | None) -> list[StageRecord]:
    """Read the records of a stage on this hardware, the newest first. `gpu` is None for any hardware."""
    runs = [record for record in store.records(stage, MAX_RECORDS).values() if record.seconds is not None]
    on_gpu = [record for record in runs if gpu is None or _is_named(gpu, device_of(record))]
    return sorted(on_gpu, key=lambda record: record.started, reverse=True)


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
    """Estimate all blocks of one kind: one cold start, and the rest in proportion to weights and tokens."""
    if not work.parameters:
        return 0.0
    measured = figures.block(kind, loop)
    rate = measured.steady_seconds / effort(figures.model.size.work(kind))
    return measured.cold_seconds - measured.steady_seconds + rate * effort(work)


def _table_minutes(parameters: float, *, low_gpu_mem: bool) -> float:
    """Read auto-round's table: linear between its rows, and in proportion to the nearest row beyond them."""
    rows = [(size, slow if low_gpu_mem else fast) for size, fast, slow in TABLE]
    for (small, least), (large, most) in pairwise(rows):
        if small <= parameters <= large:
            return least + (most - least) * (parameters - small) / (large - small)
    size, minutes = min(rows, key=lambda row: abs(row[0] - parameters))
    return minutes * parameters / size
