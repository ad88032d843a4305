"""Puts the MTP head into a checkpoint, or takes it out: the shard, the index and both configs, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.artifact import File
from tasks.checkpoint.assemble import QUANTIZATION
from tasks.checkpoint.checkpoint import INDEX, Checkpoint, read_json
from tasks.checkpoint.mtp import (
    Head,
    find_head,
    layer_count,
    with_head_entries,
    without_head_entries,
    without_layer_count,
)
from tasks.checkpoint.writer import write_json, write_shard
from tasks.errors import CheckpointError

HEAD_SHARD = "model-mtp.safetensors"


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

    def write(self, out: Path) -> list[File]:
        """Write the three, config.json and quantization_config.json saying the same."""
        files = [write_json(out, INDEX, self.index), write_json(out, "config.json", self.config)]
        if self.quantization:
            files.append(write_json(out, QUANTIZATION, self.quantization))
        return files


def shards_with_head(base: Path) -> list[str]:
    """The shards of a base that hold a part of its head, from config and index alone; the first one if it has none."""
    config, index = read_json(base / "config.json"), read_json(base / INDEX)
    text = config.get("text_config")
    head = find_head(index["weight_map"], text if isinstance(text, dict) else config)
    shards = {index["weight_map"][name] for name in head.names} if head else set(index["weight_map"].values())
    return sorted(shards) if head else sorted(shards)[:1]


def keep_head(files: HeadFiles, base: Checkpoint, out: Path) -> list[File]:
    """Write the base's head, bit for bit, in a shard of its own, and index and configs that say so.

    Raises CheckpointError if the base's config promises more layers than its tensors have.
    """
    head = base.head
    if head is None:
        raise CheckpointError(f"{base.folder} has no MTP head: use mtp: drop")
    check_head(base)
    tensors = {name: base.tensors[name] for name in head.names}
    shard = write_shard(out, HEAD_SHARD, list(tensors.values()))
    bare = without_head(files, head, keep_count=True)
    weight_map = {**bare.index["weight_map"], **dict.fromkeys(head.names, HEAD_SHARD)}
    total = bare.index["metadata"]["total_size"] + sum(t.nbytes for t in tensors.values())
    complete = replace(bare, index=_index(bare.index, weight_map, total))
    if files.quantization:
        complete = complete.with_quantization(with_head_entries(files.quantization, head, tensors))
    return [shard, *complete.write(out)]


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
