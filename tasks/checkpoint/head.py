"""Adds the MTP head to a checkpoint or removes it: its shard, the index and both configs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from requant.tasks.artifact import File
from requant.tasks.checkpoint.checkpoint import INDEX, QUANTIZATION, Checkpoint, read_json
from requant.tasks.checkpoint.config import HEAD_BITS, JsonObject, ModelConfig, QuantizationConfig
from requant.tasks.checkpoint.exclusions import with_head_entries, without_head_entries
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.header import CONFIG_DTYPES, Tensor
from requant.tasks.checkpoint.heads.layouts import INLINED, MTP, promised_layers
from requant.tasks.checkpoint.heads.missing import depths_of, stated_count
from requant.tasks.checkpoint.modules import Module, modules_of
from requant.tasks.checkpoint.mtp import Head, find_head
from requant.tasks.checkpoint.packing import (
    REQUIRED,
    Array,
    PackingScheme,
    check_parts,
    float_rows,
    pack,
    to_bytes,
)
from requant.tasks.checkpoint.reading import general_scheme
from requant.tasks.checkpoint.stored_matrix import packed_matrix
from requant.tasks.checkpoint.writer import Computed, Layout, index_document
from requant.tasks.errors import CheckpointError

HEAD_SHARD = "model-mtp.safetensors"
NAME_BASE = "name the base (--base, or the argument base in Python)"  # a remedy, as a part of a sentence
# Linear layers of a head that engines never quantize: the fusion layer, routers, embeddings and output layer.
PLAIN_LINEAR = re.compile(r"\.(fc|eh_proj|mlp\.gate|shared_expert_gate|embed_tokens|shared_head\.head)$")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class HeadFiles:
    """The files of a quantized checkpoint, besides the shards, that depend on its MTP head."""

    config: ModelConfig
    index: JsonObject

    @classmethod
    def read(cls, folder: Path) -> HeadFiles:
        return cls.of({name: read_json(folder / name) for name in ("config.json", INDEX)})

    @classmethod
    def of(cls, documents: Mapping[str, JsonObject]) -> HeadFiles:
        """Take config.json and the index from documents by name."""
        return cls(ModelConfig(documents["config.json"]), documents[INDEX])

    @property
    def documents(self) -> dict[str, JsonObject]:
        """The files by name. quantization_config.json repeats what config.json says."""
        quantization = self.config.quantization
        documents = {INDEX: self.index, "config.json": self.config}
        return documents | ({QUANTIZATION: quantization} if quantization else {})

    def write(self, out: Path) -> list[File]:
        return Layout({}, self.documents).write(out)


def shards_with_head(base: Path) -> list[str]:
    """Return the shards of a base that hold a part of its head; the first shard if it has no head."""
    config, weight_map = ModelConfig(read_json(base / "config.json")), read_json(base / INDEX)["weight_map"]
    head = find_head(weight_map, config)
    shards = {weight_map[name] for name in head.names} if head else set(weight_map.values())
    return sorted(shards) if head else sorted(shards)[:1]


def head_tensors(base: Checkpoint, precision: str, quantization: QuantizationConfig) -> Tensors:
    """Return the base's head in the form in which a checkpoint with this quantization config must hold it.

    `precision` keep: all tensors unchanged. int8, int4: linear layers of the decoder layers are rounded to nearest and
    packed with the checkpoint's group size and packing; the fusion layer, routers, fused experts and norms stay, since
    no engine reads them quantized. An FP8 head becomes BF16 unless the checkpoint is FP8 too.

    Raises CheckpointError if the base has no complete head, or if the checkpoint's packing cannot hold it.
    """
    if quantization.method != base.quantization.method:
        base = dequantize_fp8(base)
    head = base.head
    if head is None:
        raise CheckpointError(f"{base.folder} has no MTP head: use mtp: drop")
    check_head(base)
    tensors: Tensors = {name: base.tensors[name] for name in head.names}
    if precision == "keep":
        return tensors
    if head.known not in (MTP, INLINED):
        raise CheckpointError(f"how engines read a packed head of the layout {head.layout} is not known: use mtp: keep")
    scheme = general_scheme(quantization)
    if quantization.method != "auto-round" or scheme.group_size <= 0:
        raise CheckpointError(
            f"a head with {precision} needs a checkpoint of auto-round with a group size: keep it as it is"
        )
    scheme = replace(scheme, bits=HEAD_BITS[precision])
    for module in head.modules:
        weight = tensors.get(f"{module}.weight")
        if weight is not None and "layers." in module and not PLAIN_LINEAR.search(module) and _fits(weight, scheme):
            del tensors[weight.name]
            tensors |= _packed(module, weight, scheme)
    return tensors


def _fits(weight: Tensor, scheme: PackingScheme) -> bool:
    """Check whether a weight is a matrix whose sides are multiples of the group size and of 32."""
    matrix = len(weight.shape) == 2
    return matrix and not weight.shape[1] % scheme.group_size and not any(side % 32 for side in weight.shape)


def _packed(module: str, weight: Tensor, scheme: PackingScheme) -> Tensors:
    @functools.cache
    def parts() -> dict[str, Array]:
        return pack(float_rows(weight), (weight.shape[0], weight.shape[1]), scheme)

    shapes, tensors = scheme.shapes(*weight.shape), Tensors()
    for part, dtype in (("qweight", "I32"), ("qzeros", "I32"), ("scales", "F16")):
        name = f"{module}.{part}"
        tensors[name] = Computed.of(name, dtype, shapes[part], functools.partial(_bytes_of, parts, part, dtype))
    return tensors


def _bytes_of(parts: Callable[[], dict[str, Array]], part: str, dtype: str) -> Iterator[bytes]:
    yield to_bytes(parts()[part], dtype)


def dequantized_head(checkpoint: Checkpoint) -> Tensors:
    """Return a checkpoint's own head with its packed modules dequantized to the dtype of the config.

    The precision that quantization lost stays lost. Raises CheckpointError for modules that cannot be dequantized.
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
            raise CheckpointError(f"{module.name} is stored as {module.storage}: {NAME_BASE} instead")
        scheme = checkpoint.reading.scheme(module)
        missing = [part for part in REQUIRED if part not in module.parts]
        shape = () if missing else scheme.weight_shape(module.parts)
        problem = check_parts(module.name, module.packed_parts, scheme, shape)
        if problem:
            raise CheckpointError(f"{problem}: {NAME_BASE} instead")
        compute = functools.partial(_dequantized, module, scheme, dtype)
        tensors[f"{module.name}.weight"] = Computed.of(f"{module.name}.weight", dtype, shape, compute)
        tensors |= {t.name: t for part, t in module.parts.items() if part == "bias"}
    return tensors


def _dequantized(module: Module, scheme: PackingScheme, dtype: str) -> Iterator[bytes]:
    import torch  # Only a head that is packed needs it.

    from requant.tasks.checkpoint.dequantize import stripes

    matrix = packed_matrix(module.packed_parts, scheme, module.name)
    return (to_bytes(rows.numpy(), dtype) for rows in stripes(matrix, torch.device("cpu")))


def keep_head(files: HeadFiles, base: Checkpoint, out: Path, precision: str = "keep") -> list[File]:
    """Write the base's head to a shard of its own, with index and configs. Raises as `head_tensors` does."""
    return with_head(files, base, precision).write(out)


def with_head(files: HeadFiles, base: Checkpoint, precision: str = "keep") -> Layout:
    """Plan the files that `keep_head` writes."""
    quantization = files.config.quantization
    tensors = head_tensors(base, precision, quantization)
    head = Head(base.head.layout if base.head else "mtp", tuple(sorted(tensors)))
    bare = without_head(files, head, keep_count=True)
    weight_map = {**bare.index["weight_map"], **dict.fromkeys(head.names, HEAD_SHARD)}
    total = bare.index["metadata"]["total_size"] + sum(t.nbytes for t in tensors.values())
    complete = replace(bare, index=index_document(weight_map, total, bare.index))
    if quantization:
        stated = with_head_entries(quantization, head, tensors)
        complete = replace(complete, config=complete.config.with_quantization(stated))
    return Layout({HEAD_SHARD: list(tensors.values())}, complete.documents)


def without_head(files: HeadFiles, head: Head | None, *, keep_count: bool = False) -> HeadFiles:
    """Return the files of the checkpoint without a head. Unless `keep_count`, config.json promises no MTP layers."""
    config = files.config
    if config.quantization:
        config = config.with_quantization(without_head_entries(config.quantization, head))
    return replace(files, config=config if keep_count else config.without_mtp_layers())


def check_head(base: Checkpoint) -> None:
    """Check that a base has as many MTP layers as its config promises. Raises CheckpointError if not.

    What an unknown layout should have is not known: such a head is never refused. The stages of DSpark are one depth,
    and the config counts the stages.
    """
    head, promised, there = base.head, promised_layers(base.config), 0
    if head is not None:
        if head.known is None or head.known.one_depth:
            return
        promised, there = stated_count(base.config, head.known).count or 0, depths_of(head, base.config)
        if not head.known.exact:  # engines skip what is not counted
            there = min(there, promised)
    if promised and there != promised:
        raise CheckpointError(
            f"its config promises {promised} MTP layers and its tensors have {there}: use a complete base, or mtp: drop"
        )
