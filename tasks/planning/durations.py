"""How long stages take, and where that is from.

First from earlier runs on the same hardware, whose seconds lie in the store's provenance; then from what was measured
of single blocks at 27 B dimensions (gpu-figures.json, made by `make bench-gpu`); then from auto-round's own table. What
none of them knows is assumed, and called so.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import Any

from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store

Record = dict[str, Any]
RECORDS = 200  # of a stage that are looked at
FAR = 100  # a run tells nothing of one that does so many times as much: its seconds were spent on something else
# auto-round's README, W4A16 with its default recipe on an A100 with 80 GB: (parameters, minutes, with low_gpu_mem).
TABLE = ((8e9, 12, 19), (14e9, 23, 33), (70e9, 120, 140))
TABLE_GPU = "A100 80GB"
DEFAULT = {"iters": 200, "nsamples": 128, "seqlen": 2048, "batch_size": 8}
# Bytes a second where nothing was measured: of a network, of a disk, of both models passing through; and seconds that
# it takes at least: torch is imported, an engine starts twice and answers every prompt.
ASSUMED = {"download": 100e6, "mtp_fix": 200e6, "validate": 100e6, "benchmark": 25e6, "publish": 50e6}
MIN_STAGE_SECONDS = {"validate": 10.0, "benchmark": 60.0}


@dataclass(frozen=True)
class Figure:
    """Seconds, and in words where they are from."""

    seconds: float
    source: str


def effort(parameters: float, job: Mapping[str, Any]) -> float:
    """What tuning so many weights costs, in weights times tokens passed forward: three times a token that is tuned on
    (forward, and backward twice), twice one that only passes through."""
    tuned = 3 * int(job["iters"]) * int(job["batch_size"])
    return parameters * int(job["seqlen"]) * (tuned + 2 * int(job["nsamples"]))


def quantize_figure(store: Store, recipe: Recipe, blocks: Mapping[str, int], linear: set[str]) -> Figure:
    """How long quantizing takes. blocks: packed weights by decoder block; linear: those with linear attention."""
    job, gpu = recipe.quantize.model_dump(), hardware(recipe)
    asked = effort(sum(blocks.values()), job)
    found = [r for r in records(store, "quantize", gpu) if _tells(r, job["fast"])]
    near = [r for r in found if asked <= FAR * _effort_of(r) or gpu == "cpu"]  # of a CPU nothing else is known
    if near and asked:
        record = min(near, key=lambda r: abs(math.log(asked / _effort_of(r))))
        told = _block_seconds(record)
        steady = statistics.median(told)
        beside = max(0.0, record["seconds"] - steady * len(told))
        seconds = beside + steady * len(told) * asked / _effort_of(record)
        return Figure(seconds, f"an earlier run on {device_of(record)}, {record['started'][:10]}")
    measured = _measured()
    card = measured["card"]["name"]
    if gpu is None or _same(gpu, card):
        variant = "auto-round" if recipe.quantize.fast is False else "requant"
        seconds = sum(_of_blocks(measured, kind, variant, job, blocks, linear) for kind in ("linear", "full"))
        return Figure(seconds, f"blocks of 27 B dimensions measured on {card}, {measured['date']}")
    minutes = _from_table(sum(blocks.values()), low=recipe.quantize.low_gpu_mem is True)
    scale = effort(1, job) / effort(1, DEFAULT)
    return Figure(60 * minutes * scale, f"auto-round's table for {TABLE_GPU}: nothing was measured on {gpu} yet")


def stage_figure(store: Store, stage: str, recipe: Recipe, nbytes: int) -> Figure:
    """How long another stage takes that moves or reads so many bytes."""
    engine = recipe.benchmark.engine if stage == "benchmark" else None
    if engine == "none":
        return Figure(0.0, "nothing is measured")
    found = [r for r in records(store, stage, hardware(recipe)) if r.get("seconds") and 0 < nbytes <= FAR * bytes_of(r)]
    if engine is not None:
        found = [r for r in found if _engine_of(r) == engine or (engine == "auto" and _engine_of(r) != "none")]
    if found:
        nearest = min(found, key=lambda record: abs(bytes_of(record) - nbytes))
        seconds = nearest["seconds"] * max(1.0, nbytes / bytes_of(nearest))
        return Figure(seconds, f"an earlier run on {device_of(nearest)}, {nearest['started'][:10]}")
    seconds = MIN_STAGE_SECONDS.get(stage, 0.0) + nbytes / ASSUMED[stage]
    return Figure(seconds, f"assumed: {ASSUMED[stage] / 1e6:.0f} MB/s")


def hardware(recipe: Recipe) -> str | None:
    """The hardware that the recipe speaks of: a GPU's name, or `cpu`; None: whatever there is."""
    if recipe.hardware is not None and recipe.hardware.gpu is not None:
        return recipe.hardware.gpu
    return "cpu" if recipe.quantize.device == "cpu" else None


def records(store: Store, stage: str, gpu: str | None) -> list[Record]:
    """Provenance of a stage on this hardware, the newest first."""
    recorded = store.records(stage, RECORDS).values()
    found = [r for r in recorded if "seconds" in r and (gpu is None or _same(gpu, device_of(r)))]
    return sorted(found, key=lambda record: str(record.get("started", "")), reverse=True)


def device_of(record: Record) -> str:
    """What a stage ran on: its GPU by name, or `cpu`."""
    settings, machine = record.get("settings") or {}, record.get("machine") or {}
    if settings.get("device"):
        return str(settings["device"])
    return ", ".join(machine.get("gpus") or []) or "cpu"


def bytes_of(record: Record) -> int:
    """The bytes that a recorded stage moved or read; 0 if it does not say."""
    return int(record.get("bytes_read") or record.get("bytes_moved") or 0)


def _tells(record: Record, fast: Any) -> bool:
    """Whether a record of quantize says what it did, by the tuning loop that is asked for."""
    work = record.get("work")
    return bool(work and work["parameters"] and work["fast"] == fast and _block_seconds(record))


def _effort_of(record: Record) -> float:
    return effort(record["work"]["parameters"], record["work"])


def _block_seconds(record: Record) -> list[float]:
    return [block["seconds"] for block in record.get("blocks") or [] if "seconds" in block]


def _engine_of(record: Record) -> Any:
    return (record.get("measured") or {}).get("engine")


def _same(asked: str, name: str) -> bool:
    """Whether the words of a GPU's name are all in another: `H100` is an `NVIDIA H100 80GB HBM3`."""
    words = name.lower().split()
    return all(word in words for word in asked.lower().split())


def _measured() -> dict[str, Any]:
    text = resources.files("requant.tasks.planning").joinpath("gpu-figures.json").read_text()
    figures: dict[str, Any] = json.loads(text)
    for kind, variants in (figures.get("measured_again") or {}).get("blocks", {}).items():
        figures["blocks"][kind] |= variants
    return figures


def _of_blocks(
    measured: Mapping[str, Any], kind: str, variant: str, job: Mapping[str, Any], blocks: Mapping[str, int],
    linear: set[str],
) -> float:  # fmt: skip
    """Seconds for all blocks of one kind: one cold start, and each block in proportion to its weights and tokens."""
    figure, size = measured["blocks"][kind][variant], measured["model"]["size"]
    weights = sum(count for block, count in blocks.items() if (block in linear) == (kind == "linear"))
    if not weights:
        return 0.0
    rate = figure["steady_seconds"] / effort(_weights_of(size, kind), size)
    return float(figure["cold_seconds"] - figure["steady_seconds"] + rate * effort(weights, job))


def _weights_of(size: Mapping[str, int], kind: str) -> int:
    """Packed weights of one measured block: its attention's and its MLP's matrices."""
    hidden, mlp = size["hidden"], 3 * size["hidden"] * size["intermediate"]
    if kind == "full":
        return mlp + hidden * size["head_dim"] * (3 * size["heads"] + 2 * size["kv_heads"])
    return mlp + hidden * size["linear_dim"] * (2 * size["key_heads"] + 3 * size["value_heads"])


def _from_table(parameters: float, *, low: bool) -> float:
    """Minutes for so many weights, between the table's rows in proportion, beyond them from the nearest."""
    rows = [(size, slow if low else fast) for size, fast, slow in TABLE]
    for (small, least), (large, most) in pairwise(rows):
        if small <= parameters <= large:
            return least + (most - least) * (parameters - small) / (large - small)
    size, minutes = min(rows, key=lambda row: abs(row[0] - parameters))
    return minutes * parameters / size
