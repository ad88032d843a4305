"""Puts the MTP head into a checkpoint, or takes it out: the shard, the index and both configs, in one place."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from requant.tasks.artifact import File
from requant.tasks.checkpoint.checkpoint import INDEX, QUANTIZATION, Checkpoint, read_json
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.header import CONFIG_DTYPES, Tensor
from requant.tasks.checkpoint.modules import Module, modules_of
from requant.tasks.checkpoint.mtp import (
    Head,
    find_head,
    layer_count,
    with_head_entries,
    without_head_entries,
    without_layer_count,
)
from requant.tasks.checkpoint.packing import (
    REQUIRED,
    PackingScheme,
    check_parts,
    dequantized_rows,
    float_rows,
    pack,
    to_bytes,
)
from requant.tasks.checkpoint.writer import Computed, Layout
from requant.tasks.errors import CheckpointError

HEAD_SHARD = "model-mtp.safetensors"
# Linear layers of a head that engines build without quantization: the fusion layer and the routers.
PLAIN_LINEAR = re.compile(r"\.(fc|eh_proj|mlp\.gate|shared_expert_gate|embed_tokens|shared_head\.head)$")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class HeadFiles:
    """The three small files of a quantized checkpoint that speak of its head."""

    config: dict[str, Any]
    index: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> HeadFiles:
        return cls(read_json(folder / "config.json"), read_json(folder / INDEX))

    @property
    def quantization(self) -> dict[str, Any]:
        document = self.config.get("quantization_config")
        return document if isinstance(document, dict) else {}

    def with_quantization(self, quantization: Mapping[str, Any]) -> HeadFiles:
        return replace(self, config={**self.config, "quantization_config": dict(quantization)})

    @property
    def documents(self) -> dict[str, Any]:
        """The three by name, config.json and quantization_config.json saying the same."""
        documents = {INDEX: self.index, "config.json": self.config}
        return documents | ({QUANTIZATION: self.quantization} if self.quantization else {})

    def write(self, out: Path) -> list[File]:
        return Layout({}, self.documents).write(out)


def shards_with_head(base: Path) -> list[str]:
    """The shards of a base that hold a part of its head, from config and index alone; the first one if it has none."""
    config, index = read_json(base / "config.json"), read_json(base / INDEX)
    text = config.get("text_config")
    head = find_head(index["weight_map"], text if isinstance(text, dict) else config)
    shards = {index["weight_map"][name] for name in head.names} if head else set(index["weight_map"].values())
    return sorted(shards) if head else sorted(shards)[:1]


def head_tensors(base: Checkpoint, precision: str = "keep", quantization: Mapping[str, Any] | None = None) -> Tensors:
    """The base's head as a checkpoint with this quantization config is to hold it.

    `keep`: every tensor as it is. `int8`, `int4`: the linear layers of its decoder layers rounded to nearest and packed
    with the checkpoint's group size and packing; the fusion layer, routers, fused experts and norms as they are, since
    no engine reads those packed. An FP8 head is BF16 in a checkpoint that is not FP8 itself. Raises CheckpointError if
    the base has no complete head, or the packing none for it.
    """
    if (quantization or {}).get("quant_method") != base.quantization.get("quant_method"):
        base = dequantize_fp8(base)
    head = base.head
    if head is None:
        raise CheckpointError(f"{base.folder} has no MTP head: use mtp: drop")
    check_head(base)
    tensors: Tensors = {name: base.tensors[name] for name in head.names}
    if precision == "keep":
        return tensors
    scheme = PackingScheme.of(quantization or {}, "")
    if (quantization or {}).get("quant_method") != "auto-round" or scheme.group_size <= 0:
        raise CheckpointError(
            f"a head with {precision} needs a checkpoint of auto-round with a group size: keep it as it is"
        )
    scheme = replace(scheme, bits=int(precision.removeprefix("int")))
    for module in head.modules:
        weight = tensors.get(f"{module}.weight")
        if weight is not None and "layers." in module and not PLAIN_LINEAR.search(module) and _divides(weight, scheme):
            del tensors[weight.name]
            tensors |= _packed(module, weight, scheme)
    return tensors


def _divides(weight: Tensor, scheme: PackingScheme) -> bool:
    """Whether the sides of a weight fit the scheme's groups and words."""
    matrix = len(weight.shape) == 2
    return matrix and not weight.shape[1] % scheme.group_size and not any(side % 32 for side in weight.shape)


def _packed(module: str, weight: Tensor, scheme: PackingScheme) -> Tensors:
    @functools.cache
    def parts() -> dict[str, Any]:
        return pack(float_rows(weight), (weight.shape[0], weight.shape[1]), scheme)

    shapes, tensors = scheme.shapes(*weight.shape), Tensors()
    for part, dtype in (("qweight", "I32"), ("qzeros", "I32"), ("scales", "F16")):
        name = f"{module}.{part}"
        tensors[name] = Computed.of(name, dtype, shapes[part], functools.partial(_bytes_of, parts, part, dtype))
    return tensors


def _bytes_of(parts: Callable[[], dict[str, Any]], part: str, dtype: str) -> Iterator[bytes]:
    yield to_bytes(parts()[part], dtype)


def dequantized_head(checkpoint: Checkpoint) -> Tensors:
    """A checkpoint's own head with its packed modules as plain weights of the config's dtype, nothing else changed.

    Lossy: the weights are what the packing left of them. Zero points are read as the checkpoint's packing has them.
    """
    head = checkpoint.head
    if head is None:
        raise CheckpointError(f"{checkpoint.folder} has no MTP head")
    dtype = CONFIG_DTYPES.get(
        str(checkpoint.text_config.get("dtype") or checkpoint.text_config.get("torch_dtype")), "BF16"
    )
    tensors = Tensors()
    for module in modules_of(checkpoint.tensors[name] for name in head.names).values():
        if module.storage == "plain":
            tensors |= {tensor.name: tensor for tensor in module.parts.values()}
            continue
        if module.storage != "integer":
            raise CheckpointError(f"{module.name} is stored as {module.storage}: name the base with --base instead")
        scheme = PackingScheme.of(checkpoint.quantization, module.name)
        missing = [part for part in REQUIRED if part not in module.parts]
        shape = () if missing else scheme.weight_shape(module.parts)
        wrong = check_parts(module.name, module.packed_parts, scheme, shape)
        if wrong:
            raise CheckpointError(f"{wrong}: name the base with --base instead")
        compute = functools.partial(_dequantized, module, scheme, dtype)
        tensors[f"{module.name}.weight"] = Computed.of(f"{module.name}.weight", dtype, shape, compute)
        tensors |= {t.name: t for part, t in module.parts.items() if part == "bias"}
    return tensors


def _dequantized(module: Module, scheme: PackingScheme, dtype: str) -> Iterator[bytes]:
    return (to_bytes(rows, dtype) for rows in dequantized_rows(module.packed_parts, scheme))


def keep_head(files: HeadFiles, base: Checkpoint, out: Path, precision: str = "keep") -> list[File]:
    """Write the base's head in a shard of its own, and index and configs that say so. Raises as `head_tensors`."""
    return with_head(files, base, precision).write(out)


def with_head(files: HeadFiles, base: Checkpoint, precision: str = "keep") -> Layout:
    """What `keep_head` writes."""
    tensors = head_tensors(base, precision, files.quantization)
    head = Head(base.head.layout if base.head else "mtp", tuple(sorted(tensors)))
    bare = without_head(files, head, keep_count=True)
    weight_map = {**bare.index["weight_map"], **dict.fromkeys(head.names, HEAD_SHARD)}
    total = bare.index["metadata"]["total_size"] + sum(t.nbytes for t in tensors.values())
    complete = replace(bare, index=_index(bare.index, weight_map, total))
    if files.quantization:
        complete = complete.with_quantization(with_head_entries(files.quantization, head, tensors))
    return Layout({HEAD_SHARD: list(tensors.values())}, complete.documents)


def without_head(files: HeadFiles, head: Head | None, *, keep_count: bool = False) -> HeadFiles:
    """The three files of a checkpoint that holds no head tensors; the config promises no MTP layer either."""
    quantization = without_head_entries(files.quantization, head)
    bare = files.with_quantization(quantization) if files.quantization else files
    return bare if keep_count else replace(bare, config=without_layer_count(bare.config))


def _index(index: Mapping[str, Any], weight_map: Mapping[str, str], total: int) -> dict[str, Any]:
    metadata = {**index.get("metadata", {}), "total_size": total}
    return {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def check_head(base: Checkpoint) -> None:
    """Raises CheckpointError if the config of a base promises more MTP layers than its tensors have, or fewer."""
    head, promised = base.head, layer_count(base.text_config)
    present: set[str] = set()
    if head is not None:
        inside = (name.split("layers.")[1].split(".")[0] for name in head.names if "layers." in name)
        present = set(inside if head.layout == "mtp" else head.prefixes)
    if promised and len(present) != promised:
        raise CheckpointError(
            f"its config promises {promised} MTP layers and its tensors have {len(present)}: "
            "use a complete base, or mtp: drop"
        )
