"""Says to how many bits engines round the inputs of quantized layers, by the words of each method's config.

Validation computes with the weights that are stored, and leaves their inputs as they are: how engines round these
depends on the kernel.
"""

from __future__ import annotations

import re

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig
from requant.tasks.checkpoint.methods import AUTO_ROUND_METHODS, FP8_METHODS, MODELOPT_METHODS

# Algorithms of ModelOpt whose name says nothing of 16-bit inputs: modelopt/torch/export/quant_utils.py of 0.33.
MODELOPT_BITS = ((re.compile(r"W\d+A(\d+)"), None), (re.compile(r"NVFP4|MXFP4"), 4), (re.compile(r"FP8|INT8_SQ"), 8))


def rounded_inputs(checkpoint: Checkpoint) -> str | None:
    """Return what is not computed of rounded inputs, as a sentence; None if the config asks for none."""
    bits = _bits(checkpoint.quantization)
    if bits is None or bits >= 16:
        return None
    return (
        f"engines round the inputs of its quantized layers to {bits} bits, and here they are not rounded: "
        "all values are those of the weights alone"
    )


def _bits(quantization: QuantizationConfig) -> int | None:
    """Return the bits of the inputs; the fewest if layers differ; None if nothing is rounded or known."""
    method = quantization.method
    if method == "compressed-tensors":
        groups = [g for g in (quantization.child("config_groups") or JsonObject()).values() if isinstance(g, dict)]
        inputs = [g["input_activations"] for g in groups if isinstance(g.get("input_activations"), dict)]
        widths = [one.get("num_bits") for one in inputs]
        return min((width for width in widths if type(width) is int), default=None)
    if method in AUTO_ROUND_METHODS:
        return quantization.integer("act_bits")
    if method in FP8_METHODS:
        return 8
    if method in MODELOPT_METHODS or quantization.string("quant_algo"):
        inner = quantization.child("quantization") or quantization
        return _of_algorithm((inner.string("quant_algo") or "").upper())
    return None


def _of_algorithm(algorithm: str) -> int | None:
    for pattern, bits in MODELOPT_BITS:
        if match := pattern.search(algorithm):
            return int(match[1]) if bits is None else bits
    return None
