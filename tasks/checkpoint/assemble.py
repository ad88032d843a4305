"""Assembles a quantized checkpoint from auto-round's packed tensors and all other tensors of the base.

auto-round changes the dtype of tensors that it does not quantize, and rewrites other files. Therefore only `qweight`,
`qzeros`, `scales` and `g_idx` are taken from its output, and everything else is copied from the base byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from requant.tasks.artifact import File
from requant.tasks.checkpoint.checkpoint import INDEX, QUANTIZATION, Checkpoint
from requant.tasks.checkpoint.config import QuantizationConfig
from requant.tasks.checkpoint.exclusions import without_head_entries
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import INTEGER_PARTS, Module, modules_of
from requant.tasks.checkpoint.reading import Reading
from requant.tasks.checkpoint.writer import Layout, index_of, split_into_shards
from requant.tasks.errors import CheckpointError


def assemble(base: Checkpoint, packed: Checkpoint, bits: Mapping[str, int], out: Path) -> list[File]:
    """Write weights, index, config.json and quantization_config.json of the quantized checkpoint, without the MTP head.

    `base`: the checkpoint that auto-round quantized, after `dequantize_fp8` and `split_fused_experts`.
    `packed`: auto-round's output.
    `bits`: the bits of each layer, as auto-round reports them. A layer with fewer than 16 bits must have packed parts
    with the shapes of its scheme, and no other layer may have any.

    Raises CheckpointError, which names the first layer that is not as it should be.
    """
    if not packed.config.quantization:
        raise CheckpointError(f"{packed.folder} has no quantization_config: auto-round did not finish")
    quantization = without_head_entries(packed.config.quantization, base.head)
    # auto-round may have packed experts of the head, which it splits: the base has no tensors of their names.
    in_head = tuple(f"{prefix}." for prefix in (base.head.prefixes if base.head else ()))
    parts = {m: p for m, p in packed_parts(packed.tensors.values()).items() if not m.startswith(in_head)}
    asked = {m for m, b in bits.items() if b < 16 and not m.startswith(in_head)}
    check_modules(base, parts, asked, quantization)
    return lay_out_shards(base, parts, quantization).write(out)


def lay_out_shards(
    base: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]], quantization: QuantizationConfig
) -> Layout:
    """Plan the files of the quantized checkpoint, without the MTP head. `parts`: packed parts by module."""
    in_head = set(base.head.names if base.head else ())
    shards = split_into_shards(_in_base_order(base, parts, in_head))
    documents = {
        INDEX: index_of(shards),
        "config.json": base.config.with_quantization(quantization),
        QUANTIZATION: quantization,
    }
    return Layout(shards, documents)


def packed_parts(tensors: Iterable[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the packed parts of every module that has a `qweight`, by module name."""
    return {name: m.packed_parts for name, m in modules_of(tensors).items() if "qweight" in m.parts}


def check_modules(
    base: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]], asked: Iterable[str], quantization: QuantizationConfig
) -> None:
    """Check that exactly the modules in `asked` are quantized, with parts that fit the base's weights.

    Raises CheckpointError, which names the first module with a problem.
    """
    asked, reading = set(asked), Reading.of(base.config, quantization)
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
        wrong = reading.problem(Module(module, dict(parts[module])), weight.shape)
        if wrong:
            raise CheckpointError(wrong)


def _in_base_order(base: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]], skip: set[str]) -> Iterable[Tensor]:
    for tensor in base.tensors.values():
        if tensor.name in skip:
            continue
        module, _, last = tensor.name.rpartition(".")
        if last == "weight" and module in parts:
            yield from (parts[module][part] for part in INTEGER_PARTS if part in parts[module])
        else:
            yield tensor
