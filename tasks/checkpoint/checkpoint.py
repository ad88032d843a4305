"""A checkpoint folder: config, index and the tensors of all its shards, from headers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from requant.tasks.artifact import check_relative
from requant.tasks.checkpoint.header import Tensor, read_header, size_of, unreadable
from requant.tasks.checkpoint.modules import Module, modules_of
from requant.tasks.checkpoint.mtp import Head, find_head
from requant.tasks.checkpoint.untrusted import check_depth, parse, shown
from requant.tasks.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZATION = "quantization_config.json"
# Where a quantization config may lie beside config.json: auto-round's, AutoGPTQ's and AutoAWQ's names.
BESIDE = (QUANTIZATION, "quantize_config.json", "quant_config.json")
MAX_JSON = 64 << 20
MAX_SHARDS = 100_000
MAX_PROBLEMS_OF_KIND = 100  # problems of one kind; a hostile index has a million
PLAIN_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)
WRONG_TOTAL = "the index says total_size"
STALE = "which the index does not name"


class Harmless(str):
    """A problem that keeps no reader from loading the checkpoint."""


class Ambiguous(Harmless):
    """A problem that no reader notices, each choosing for itself: nothing is built on such a checkpoint."""


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
    coming: Mapping[str, Path] = field(default_factory=dict)  # files that the folder will have, and where they lie now

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config, index and headers. Raises CheckpointError only where nothing sensible can be said."""
        if not folder.is_dir():
            raise CheckpointError(f"{shown(str(folder))} is not a folder: name a checkpoint's folder")
        problems: list[str] = []
        config = _read(folder / "config.json", problems)
        weight_map: dict[str, Any] | None = None
        total_size: int | None = None
        if os.path.lexists(folder / INDEX):
            index = _read(folder / INDEX, problems)
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{shown(str(folder / INDEX))} has no weight_map: restore the file")
            total_size = _total_size(index)
            shards = _shards(folder, weight_map, problems)
            _strays(folder, shards, problems)
        elif os.path.lexists(folder / SINGLE):
            shards = (SINGLE,)
        else:
            raise CheckpointError(
                f"{shown(str(folder))} has neither {INDEX} nor {SINGLE}: only safetensors checkpoints can be read"
            )
        tensors = _tensors(folder, shards, weight_map, problems)
        held = sum(t.nbytes for t in tensors.values())
        if total_size is not None and total_size != held and all(isinstance(p, Harmless) for p in problems):
            problems.append(Harmless(f"{WRONG_TOTAL} {total_size}, the tensors have {held} bytes: run requant mtp-fix"))
        return cls(folder, config, tensors, shards, total_size, problems)

    @classmethod
    def open_shards(cls, folder: Path, shards: Sequence[str]) -> Checkpoint:
        """A part of a checkpoint: config and these shards, whatever else its index names."""
        tensors = {name: t for shard in shards for name, t in read_header(folder / shard).items()}
        return cls(folder, read_json(folder / "config.json"), tensors, tuple(shards), None)

    def sound(self) -> Checkpoint:
        """This checkpoint, if a reader can load it, and no two of them differently; else CheckpointError with the
        first problem."""
        hindering = [*self.fatal, *(p for p in self.problems if isinstance(p, Ambiguous))]
        if hindering:
            more = f" (and {len(hindering) - 1} more: see requant inspect)" if len(hindering) > 1 else ""
            raise CheckpointError(f"{shown(str(self.folder))}: {hindering[0]}{more}")
        return self

    @property
    def fatal(self) -> list[str]:
        """The problems that keep a reader from loading it: all but a wrong total_size, shards left over, and keys
        that stand twice."""
        return [p for p in self.problems if not isinstance(p, Harmless)]

    @cached_property
    def head(self) -> Head | None:
        """The MTP head among the tensors, or None."""
        return find_head(self.tensors, self.text_config)

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """The tensors by module."""
        return modules_of(self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def file(self, name: str) -> Path:
        """Where a file of the checkpoint lies; there need not be one."""
        return self.coming.get(name, self.folder / name)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: `text_config` of a multimodal one, else the config itself."""
        part = self.config.get("text_config")
        return part if isinstance(part, dict) else self.config

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The quantization config, or {}: config.json's, else the file beside it that a quantizer has written."""
        for part in (self.config, self.text_config):
            for key in ("quantization_config", "compression_config"):
                if isinstance(part.get(key), dict):
                    return dict(part[key])
        return next((read_json(self.folder / name) for name in BESIDE if (self.folder / name).is_file()), {})


def _total_size(index: Mapping[str, Any]) -> int | None:
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    sound = isinstance(stated, int | float) and abs(stated) < 1 << 62  # NaN is not
    return int(stated) if sound and stated is not None else None


def _shards(folder: Path, weight_map: Mapping[str, Any], problems: list[str]) -> tuple[str, ...]:
    """The files that an index names, without those that may not be opened."""
    nowhere = [name for name, shard in weight_map.items() if not isinstance(shard, str)]
    _tell(problems, nowhere, lambda name: f"the index names no file for {shown(name)}: restore the index")
    named = sorted({shard for shard in weight_map.values() if isinstance(shard, str)})
    if len(named) > MAX_SHARDS:
        raise CheckpointError(f"{INDEX} names {len(named):,} shards, more than any checkpoint has: restore the file")
    outside = [shard for shard in named if not _stays_inside(folder, shard)]
    _tell(problems, outside, lambda shard: f"the index names {shown(shard)}, no file of this folder: restore the index")
    inside = [shard for shard in named if _stays_inside(folder, shard)]
    foreign = [shard for shard in inside if not shard.endswith(".safetensors")]
    _tell(problems, foreign, lambda shard: f"the index names {shown(shard)}: only safetensors shards are read")
    return tuple(shard for shard in inside if shard.endswith(".safetensors"))


def _stays_inside(folder: Path, shard: str) -> bool:
    """Whether a name is a file's in this folder. A file there may be a link, as in the Hub's cache: it is replaced,
    never written through. A folder may not lead outside: what is replaced or removed there would be another's."""
    if PLAIN_NAME.fullmatch(shard):
        return True
    try:
        check_relative(shard)
    except CheckpointError:
        return False
    parent = os.path.realpath((folder / shard).parent)
    return os.path.commonpath([parent, root := os.path.realpath(folder)]) == root


def _strays(folder: Path, shards: Sequence[str], problems: list[str]) -> None:
    """Weights that lie about: a loader that prefers or globs them reads something else than the index says."""
    named = set(shards)
    if SINGLE not in named and os.path.lexists(folder / SINGLE):
        problems.append(f"{SINGLE} lies beside a sharded index: loaders prefer it and miss the other shards")
    lying = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in {SINGLE, *named})
    stale = [name for name in lying if not name.startswith("consolidated")]  # Mistral's own loader reads those
    remedy = "delete it, or restore the index that it belongs to"
    _tell(problems, stale, lambda name: Harmless(f"{shown(name)} is a shard {STALE}: {remedy}"))


def _tensors(
    folder: Path, shards: Sequence[str], weight_map: Mapping[str, Any] | None, problems: list[str]
) -> dict[str, Tensor]:
    """The tensors that index and headers agree on."""
    tensors: dict[str, Tensor] = {}
    read: set[str] = set()
    missing: list[str] = []
    broken: list[str] = []
    strange: list[str] = []
    for shard in shards:
        try:
            header = read_header(folder / shard)
        except FileNotFoundError:
            missing.append(shard)
            continue
        except CheckpointError as error:
            broken.append(str(error))
            continue
        read.add(shard)
        for name, tensor in header.items():
            if weight_map is None or weight_map.get(name) == shard:
                tensors[name] = tensor
            else:
                strange.append(_strange(name, shard, weight_map))
    _tell(
        problems, missing, lambda s: f"the index names {shown(s)}, which is missing: fetch it from the base or the Hub"
    )
    _tell(problems, broken, str)
    _tell(problems, strange, str)
    if weight_map is not None:
        stated = weight_map
        lost = [n for n, s in stated.items() if isinstance(s, str) and s in read and n not in tensors]
        _tell(problems, lost, lambda n: f"the index names {shown(n)}, which is not in {shown(stated[n])}")
    return tensors


def _strange(name: str, shard: str, weight_map: Mapping[str, Any]) -> str:
    if name not in weight_map:
        return f"{shown(name)} is in {shown(shard)} but not in the index"
    return f"{shown(name)} is in {shown(shard)}, but the index says {shown(str(weight_map[name]))}"


def _tell(problems: list[str], found: Sequence[str], sentence: Callable[[str], str]) -> None:
    """Add a sentence for each, or for the first hundred and their number."""
    problems += [sentence(name) for name in found[:MAX_PROBLEMS_OF_KIND]]
    if len(found) > MAX_PROBLEMS_OF_KIND:
        problems.append(
            type(problems[-1])(f"{len(found) - MAX_PROBLEMS_OF_KIND:,} more problems are like this: {problems[-1]}")
        )


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object, and a problem if a key stands twice in it."""
    document, repeated = _parse(path)
    if repeated:
        more = f" (and {len(repeated) - 1:,} more such keys)" if len(repeated) > 1 else ""
        problems.append(Ambiguous(f"{path.name} says {shown(repeated[0])} twice{more}: keep one of the two"))
    return document


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. Raises CheckpointError with the file's name."""
    return _parse(path)[0]


def _parse(path: Path) -> tuple[dict[str, Any], list[str]]:
    file = shown(str(path))
    try:
        size = size_of(path)
        if size > MAX_JSON:
            raise CheckpointError(f"{file} is larger than {MAX_JSON >> 20} MiB: not a checkpoint's file")
        with path.open("rb") as stream:
            document, repeated = parse(stream.read(size))  # no more: files of the kernel have no size and no end
        check_depth(document)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: name a checkpoint's folder") from error
    except CheckpointError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}): restore the file") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{file} is not a JSON object: restore the file")
    return document, repeated
