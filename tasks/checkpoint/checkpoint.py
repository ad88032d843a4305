"""A checkpoint folder: config, index and the tensors of all its shards, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.artifact import check_relative
from tasks.checkpoint.header import Tensor, read_header
from tasks.checkpoint.mtp import Head, find_head
from tasks.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON = 64 << 20
WRONG_TOTAL = "the index says total_size"


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. `tensors` are in the order in which a sequential reader meets them.

    `problems` are sentences about contradictions between index, files and headers; a checkpoint with problems
    can be looked at but not worked on (`sound`).
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    shards: tuple[str, ...]
    total_size: int | None
    problems: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config, index and headers. Raises CheckpointError only where nothing sensible can be said."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder: name a checkpoint's folder")
        config = read_json(folder / "config.json")
        problems: list[str] = []
        weight_map: dict[str, Any] | None = None
        total_size: int | None = None
        if (folder / INDEX).exists():
            index = read_json(folder / INDEX)
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{folder / INDEX} has no weight_map: restore the file")
            metadata = index.get("metadata")
            stated = metadata.get("total_size") if isinstance(metadata, dict) else None
            if isinstance(stated, int | float) and abs(stated) < 1 << 62:  # NaN is not
                total_size = int(stated)
            shards = _shards(folder, weight_map)
            if (folder / SINGLE).exists() and SINGLE not in shards:
                problems.append(f"{SINGLE} lies beside a sharded index: loaders prefer it and miss the other shards")
        elif (folder / SINGLE).exists():
            shards = (SINGLE,)
        else:
            raise CheckpointError(
                f"{folder} has neither {INDEX} nor {SINGLE}: only safetensors checkpoints can be read"
            )

        tensors: dict[str, Tensor] = {}
        for shard in shards:
            if not (folder / shard).is_file():
                problems.append(f"the index names {shard}, which is missing")
                continue
            for name, tensor in read_header(folder / shard).items():
                if weight_map is not None and name not in weight_map:
                    problems.append(f"{name} is in {shard} but not in the index")
                elif weight_map is not None and weight_map[name] != shard:
                    problems.append(f"{name} is in {shard}, but the index says {weight_map[name]}")
                else:
                    tensors[name] = tensor
        if weight_map is not None:
            present = {s for s in shards if (folder / s).is_file()}
            lost = [n for n, s in weight_map.items() if s in present and n not in tensors]
            problems += [f"the index names {name}, which is not in {weight_map[name]}" for name in lost]
            held = sum(t.nbytes for t in tensors.values())
            if total_size is not None and total_size != held and not problems:
                problems.append(f"{WRONG_TOTAL} {total_size}, the tensors have {held} bytes")
        return cls(folder, config, tensors, shards, total_size, problems)

    @classmethod
    def open_shards(cls, folder: Path, shards: Sequence[str]) -> Checkpoint:
        """A part of a checkpoint: config and these shards, whatever else its index names."""
        tensors = {name: t for shard in shards for name, t in read_header(folder / shard).items()}
        return cls(folder, read_json(folder / "config.json"), tensors, tuple(shards), None)

    def sound(self) -> Checkpoint:
        """This checkpoint, if it has no problems but a wrong total_size; else CheckpointError with the first."""
        if self.fatal:
            more = f" (and {len(self.fatal) - 1} more: see requant inspect)" if len(self.fatal) > 1 else ""
            raise CheckpointError(f"{self.folder}: {self.fatal[0]}{more}")
        return self

    @property
    def fatal(self) -> list[str]:
        """The problems that keep a reader from loading it: all but a wrong total_size."""
        return [p for p in self.problems if not p.startswith(WRONG_TOTAL)]

    @cached_property
    def head(self) -> Head | None:
        """The MTP head among the tensors, or None."""
        return find_head(self.tensors, self.text_config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: `text_config` of a multimodal one, else the config itself."""
        part = self.config.get("text_config")
        return part if isinstance(part, dict) else self.config


def _shards(folder: Path, weight_map: dict[str, Any]) -> tuple[str, ...]:
    shards = sorted({s if isinstance(s, str) else "" for s in weight_map.values()})
    for shard in shards:
        check_relative(shard)
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"the index of {folder} names {shard!r}: only safetensors shards are read")
    return tuple(shards)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. Raises CheckpointError with the file's name."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path} is larger than {MAX_JSON >> 20} MiB: not a checkpoint's file")
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: name a checkpoint's folder") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): restore the file") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object: restore the file")
    return document
