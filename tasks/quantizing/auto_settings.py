"""The settings that the recipe leaves to the machine (`auto`): chosen from the GPU and the model, with reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from requant.tasks.quantizing.job import Job

# Bytes per weight of the block that is tuned, on the GPU: the BF16 weight and its quantized copy, the rounding value in
# float32, its gradient, and the best rounding value so far.
TUNED_BYTES = 2 + 2 + 4 + 4 + 4
# Bytes per weight that are on the GPU beside a block, unless the samples are not: the next block in BF16.
NEXT_BLOCK_BYTES = 2
# Bytes of activations that a step keeps for its backward pass, per token and unit of width (hidden + intermediate
# size), by whether the block is compiled. 16.5 were measured for a compiled linear-attention block of 27 B dimensions
# (H200, torch 2.11); the rest is a margin.
ACTIVATION_BYTES = {True: 20, False: 60}
ROUTED = ("expert", "router", "moe")
GB = 1e9


@dataclass(frozen=True)
class LoopSettings:
    """The settings of our tuning loop.

    torch_compile    compile one step of each kind of block; a kind that fails to compile is tuned without
    offload          keep what the backward pass needs in the CPU's memory
    compare_last     compare the last step's rounding with that of the lowest batch (loop/best_iteration.py)
    """

    torch_compile: bool
    offload: bool
    compare_last: bool


@dataclass(frozen=True)
class ChosenSettings(LoopSettings):
    """All settings of a run that a machine may choose.

    fast           use our tuning loop instead of auto-round's
    low_gpu_mem    keep the samples in the CPU's memory
    reasons        why each setting was chosen, by its name
    """

    fast: bool
    low_gpu_mem: bool
    reasons: dict[str, str] = field(default_factory=dict)


def choose(job: Job, model: Any, device: str, free_bytes: int | None, same_bits: bool = False) -> ChosenSettings:
    """Choose the settings that the job leaves open, for a loaded transformers model.

    `free_bytes` of the GPU may be used; None on a CPU. `same_bits`: two runs must give the same bits.
    """
    on_gpu = device.startswith("cuda")
    routed = any(word in name.lower() for name, _ in model.named_modules() for word in ROUTED)
    reasons: dict[str, str] = {}

    def settle(name: str, asked: Literal["auto"] | bool, value: bool, reason: str) -> bool:
        reasons[name] = reason if asked == "auto" else "asked for"
        return value if asked == "auto" else asked

    fast = settle("fast", job.settings.fast, True, "auto-round's steps without its waits and copies")
    reason = "the last step's rounding is mostly better than that of the lowest batch"
    compare_last = settle("compare_last", job.settings.compare_last, True, reason)
    if not fast:
        compare_last, reasons["compare_last"] = False, "auto-round's loop keeps that of the lowest batch"

    if not on_gpu:
        compiles, reason = False, "on a CPU compiling takes longer than it saves"
    elif routed:
        compiles, reason = False, "blocks with experts take another path for each batch: nothing to compile once"
    elif same_bits:
        compiles, reason = False, "compiled blocks do not end with the same bits in every run"
    else:
        compiles, reason = True, "each kind of block is compiled once and serves all its blocks"
    torch_compile = settle("torch_compile", job.rung.torch_compile, compiles, reason)
    if on_gpu and job.rung.offload:
        torch_compile, reasons["torch_compile"] = False, "what a compiled step keeps cannot be moved to the CPU"

    if on_gpu:
        needed = resident_bytes(job, model, torch_compile)
        fits = free_bytes is None or needed <= free_bytes
        free_gb = (free_bytes or 0) / GB
        reason = f"a step needs about {needed / GB:.0f} GB with its samples on the GPU, of {free_gb:.0f} GB free"
    else:
        fits, reason = True, "there is no GPU"
    low_gpu_mem = settle("low_gpu_mem", job.rung.low_gpu_mem, not fits, reason)
    return ChosenSettings(torch_compile, job.rung.offload, compare_last, fast, low_gpu_mem, reasons)


def resident_bytes(job: Job, model: Any, compiled: bool) -> int:
    """Estimate the GPU memory in bytes for tuning the largest block, with the samples and the next block on the GPU."""
    config = getattr(model.config, "text_config", model.config)
    hidden = int(config.hidden_size)
    blocks = [b for m in model.modules() if type(m).__name__ == "ModuleList" for b in m]
    largest = max((sum(p.numel() for p in b.parameters()) for b in blocks), default=0)
    width = hidden + int(getattr(config, "intermediate_size", None) or 4 * hidden)
    samples = sample_bytes(job.settings.nsamples * job.settings.seqlen, hidden)
    step = step_bytes(job.rung.batch_size * job.settings.seqlen, largest, width, compiled)
    return samples + step + largest * NEXT_BLOCK_BYTES


def sample_bytes(tokens: int, hidden: int) -> int:
    """Estimate the bytes of a block's inputs, its outputs in full precision, and the next block's inputs, all in BF16.

    They are on the GPU, or with low_gpu_mem in the CPU's memory. `tokens` is the number of tokens of all samples.
    """
    return 3 * tokens * hidden * 2


def step_bytes(tokens: int, largest: int, width: int, compiled: bool) -> int:
    """Estimate the GPU memory in bytes that a tuning step takes: a block's weights and activations.

    `tokens` is the number of tokens of the step, `largest` the number of parameters of the largest block, and `width`
    the sum of the hidden and the intermediate size.
    """
    return largest * TUNED_BYTES + tokens * width * ACTIVATION_BYTES[compiled]


def unknown_layer(layers: Iterable[str], names: Iterable[str]) -> str | None:
    """Say in a sentence which name in the recipe's `layers` matches no module; None if all match.

    auto-round only logs a warning for such a name.
    """
    names = list(names)
    for key in layers:
        try:
            pattern = re.compile(key)
        except re.error:
            pattern = re.compile(re.escape(key))
        if not any(key in name or pattern.search(name) for name in names):
            return f"quantize.layers names {key!r}, which is in no layer of the model: correct the name"
    return None
