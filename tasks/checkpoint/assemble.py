"""Puts a quantized checkpoint together: auto-round's packed parts, and every other tensor verbatim from the base.

auto-round re-types what it does not quantize and re-writes files, so only `qweight`, `qzeros`, `scales` and `g_idx`
are taken from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from requant.tasks.artifact import File
from requant.tasks.checkpoint.checkpoint import INDEX, QUANTIZATION, Checkpoint
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import modules_of
from requant.tasks.checkpoint.mtp import without_head_entries
from requant.tasks.checkpoint.packing import GPTQ_PARTS, PackingScheme, check_parts
from requant.tasks.checkpoint.writer import Layout, index_of, split_into_shards
from requant.tasks.errors import CheckpointError


def assemble(base: Checkpoint, packed: Checkpoint, bits: Mapping[str, int], out: Path) -> list[File]:
    """Write weights, index, config.json and quantization_config.json of the quantized checkpoint, without the head.

    `base` is as it was quantized: FP8 weights as BF16 (`dequantize_fp8`), fused experts one by one
    (`split_fused_experts`).
    `bits` is what auto-round says it did to each layer; every one with fewer than 16 must have its packed parts with
    the shapes of its scheme, and nothing else may have any. Raises CheckpointError naming the first layer that is
    not as it should be: nothing is left unaccounted for.
    """
    quantization = packed.config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{packed.folder} has no quantization_config: auto-round did not finish")
    quantization = without_head_entries(quantization, base.head)
    # Fused experts of the head have no such names in the base, and may have been packed under them.
    in_head = tuple(f"{prefix}." for prefix in (base.head.prefixes if base.head else ()))
    parts = {m: p for m, p in packed_parts(packed.tensors.values()).items() if not m.startswith(in_head)}
    asked = {m for m, b in bits.items() if b < 16 and not m.startswith(in_head)}
    check_modules(base, parts, asked, quantization)

    return lay_out_shards(base, parts, quantization).write(out)


def lay_out_shards(
    base: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]], quantization: Mapping[str, Any]
) -> Layout:
    """The quantized checkpoint without the head: packed parts by module, everything else as in the base."""
    in_head = set(base.head.names if base.head else ())
    shards = split_into_shards(_in_base_order(base, parts, in_head))
    documents = {
        INDEX: index_of(shards),
        "config.json": {**base.config, "quantization_config": quantization},
        QUANTIZATION: quantization,
    }
    return Layout(shards, documents)


def packed_parts(tensors: Iterable[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module name to its packed parts, for every module that has a `qweight`."""
    return {name: m.packed_parts for name, m in modules_of(tensors).items() if "qweight" in m.parts}


def check_modules(
    base: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]], asked: Iterable[str], quantization: Mapping[str, Any]
) -> None:
    """Every module asked for has whole parts of the right shapes for a weight of the base, and no other has any."""
    asked = set(asked)
    if not asked:
        raise CheckpointError("auto-round quantized no layer: the architecture has no blocks that it knows")
    for module in sorted(asked | set(parts)):
        if module not in parts:
            raise CheckpointError(f"{module} was to be quantized and has no packed weight: see auto-round's log")
        if module not in asked:
            raise CheckpointError(f"{module} has a packed weight and was not to be quantized: see auto-round's log")
        weight = base.tensors.get(f"{module}.weight")
        if weight is None or len(weight.shape) != 2:
            raise CheckpointError(f"{module} has a packed weight, but the base has no matrix {module}.weight")
        wrong = check_parts(module, parts[module], PackingScheme.of(quantization, module), weight.shape)
        if wrong:
            raise CheckpointError(wrong)


def _in_base_order(base: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]], skip: set[str]) -> Iterable[Tensor]:
    for tensor in base.tensors.values():
        if tensor.name in skip:
            continue
        module, _, last = tensor.name.rpartition(".")
        if last == "weight" and module in parts:
            yield from (parts[module][part] for part in GPTQ_PARTS if part in parts[module])
        else:
            yield tensor
