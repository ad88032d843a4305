"""Settings that the recipe leaves to the machine (`auto`), chosen from the card and the model, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Bytes a weight of the block being tuned takes on the device: bf16 weight and its quantized copy, float32 rounding
# values, their gradients and the best of them so far.
TUNED_BYTES = 2 + 2 + 4 + 4 + 4
# Bytes of activations that a step keeps for its backward pass, per token and unit of width (hidden + intermediate),
# compiled or not: 16.5 measured on a compiled linear-attention block of 27 B dimensions (H200, torch 2.11), and room.
ACTIVATION_BYTES = {True: 20, False: 60}
ROUTED = ("expert", "router", "moe")
GB = 1e9


@dataclass(frozen=True)
class LoopSettings:
    """What our tuning loop is told, as `choose` settles it.

    torch_compile    compile one step of each kind of block; where that fails, the kind is tuned without
    offload          keep what the backward pass needs in the CPU's memory
    compare_last     compare the last step's rounding with that of the lowest batch (loop/best_iteration.py)
    """

    torch_compile: bool
    offload: bool
    compare_last: bool


def choose(
    job: dict[str, Any], model: Any, device: str, free: int | None, same_bits: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings, reasons).

    model: the loaded one; free: bytes free on the GPU, None on a CPU; same_bits: the same bits are wanted in every run.
    """
    on_gpu = device.startswith("cuda")
    routed = any(word in name.lower() for name, _ in model.named_modules() for word in ROUTED)
    settings: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def settle(name: str, value: bool, reason: str) -> None:
        asked = job.get(name, "auto")
        settings[name] = value if asked == "auto" else asked
        reasons[name] = reason if asked == "auto" else "asked for"

    settle("fast", True, "auto-round's steps without its waits and copies")
    settle("compare_last", True, "the last step's rounding is mostly better than that of the lowest batch")
    if not settings["fast"]:
        settings["compare_last"], reasons["compare_last"] = False, "auto-round's loop keeps that of the lowest batch"
    settings["offload"] = bool(job.get("offload"))
    if not on_gpu:
        settle("torch_compile", False, "on a CPU compiling takes longer than it saves")
        settle("low_gpu_mem", False, "there is no GPU")
        return settings, reasons
    if routed:
        settle("torch_compile", False, "blocks with experts take another path for each batch: nothing to compile once")
    elif same_bits:
        settle("torch_compile", False, "compiled blocks do not end with the same bits in every run")
    else:
        settle("torch_compile", True, "each kind of block is compiled once and serves all its blocks")
    if settings["offload"]:
        settings["torch_compile"] = False
        reasons["torch_compile"] = "what a compiled step keeps cannot be moved to the CPU"
    needed = resident_bytes(job, model, settings["torch_compile"])
    fits = free is None or needed <= free
    say = f"a step needs about {needed / GB:.0f} GB with its samples on the GPU, of {(free or 0) / GB:.0f} GB free"
    settle("low_gpu_mem", not fits, say)
    return settings, reasons


def resident_bytes(job: dict[str, Any], model: Any, compiled: bool) -> int:
    """What tuning the largest block takes with its inputs, the reference's outputs and their successors on the GPU."""
    config = getattr(model.config, "text_config", model.config)
    hidden = int(config.hidden_size)
    blocks = [b for m in model.modules() if type(m).__name__ == "ModuleList" for b in m]
    largest = max((sum(p.numel() for p in b.parameters()) for b in blocks), default=0)
    width = hidden + int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return sample_bytes(job, hidden) + step_bytes(job, largest, width, compiled)


def sample_bytes(job: Mapping[str, Any], hidden: int) -> int:
    """A block's inputs, the reference's outputs and their successors, BF16: on the GPU, or in memory (low_gpu_mem)."""
    return 3 * int(job["nsamples"]) * int(job["seqlen"]) * hidden * 2


def step_bytes(job: Mapping[str, Any], largest: int, width: int, compiled: bool) -> int:
    """A step of tuning: the largest block's weights with what is tuned of them, and activations.

    largest: parameters of that block; width: hidden and intermediate size together.
    """
    return largest * TUNED_BYTES + int(job["batch_size"]) * int(job["seqlen"]) * width * ACTIVATION_BYTES[compiled]


def unknown_layer(layers: Iterable[str], names: Iterable[str]) -> str | None:
    """What is wrong with a name in the recipe's `layers` that matches no module: auto-round only warns of it."""
    names = list(names)
    for key in layers:
        try:
            pattern = re.compile(key)
        except re.error:
            pattern = re.compile(re.escape(key))
        if not any(key in name or pattern.search(name) for name in names):
            return f"quantize.layers names {key!r}, which is in no layer of the model: correct the name"
    return None
