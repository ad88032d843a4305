"""Reads a checkpoint folder: its config, its index, and the headers of its shards."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from requant.tasks.artifact import check_relative
from requant.tasks.checkpoint.advice import FIX, FIX_INDEX
from requant.tasks.checkpoint.config import JsonObject, ModelConfig, QuantizationConfig
from requant.tasks.checkpoint.foreign_files import beginning_of, explain_content
from requant.tasks.checkpoint.header import Tensor, read_header, size_of, unreadable
from requant.tasks.checkpoint.methods import MODELOPT_FILE, Method, method_of
from requant.tasks.checkpoint.modules import Module, modules_of
from requant.tasks.checkpoint.mtp import Head, find_head
from requant.tasks.checkpoint.other_kinds import CHECKPOINT_FILES, explain_folder
from requant.tasks.checkpoint.shards import (
    MOVE,
    Contents,
    Headers,
    contents_of,
    lost_numbers,
    missed_by_transformers,
)
from requant.tasks.checkpoint.untrusted import MAX_JSON_BYTES, MAX_SHARDS, check_depth, parse, shown
from requant.tasks.errors import CheckpointError

if TYPE_CHECKING:
    from requant.tasks.checkpoint.completeness import Completeness
    from requant.tasks.checkpoint.reading import Reading

INDEX, SINGLE = CHECKPOINT_FILES
QUANTIZATION = "quantization_config.json"
# Files that may hold a quantization config besides config.json, as auto-round, AutoGPTQ, AutoAWQ and ModelOpt name
# them.
QUANTIZATION_FILES = (QUANTIZATION, "quantize_config.json", "quant_config.json", MODELOPT_FILE)
# The method of a file that may not name it, as its authors wrote no other.
METHODS_OF_FILES = {QUANTIZATION_FILES[1]: {"quant_method": "gptq"}, QUANTIZATION_FILES[2]: {"quant_method": "awq"}}
MAX_PROBLEMS_OF_KIND = 100  # a hostile index may have a million
SHARD_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)
WRONG_TOTAL = "the index says total_size"


class Harmless(str):
    """A problem that does not keep a reader from loading the checkpoint."""


class Ambiguous(Harmless):
    """A problem that readers do not notice but may resolve differently. Only `inspect` works on such a checkpoint."""


class OfIndex(Ambiguous):
    """An ambiguity about the file that a tensor is read from, which hinders no repair."""


class Mendable(str):
    """A contradiction of index and shards, which a new index solves if the shards have all tensors."""


class Unread(str):
    """The problem of a shard that is there and cannot be read, so that nothing is known of the tensors in it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. `tensors` are in the order in which a sequential reader meets them.

    `problems`: contradictions between index, files and headers, as sentences. A checkpoint with problems can be
    inspected, but `sound` refuses it for any other work.
    `pending_files`: files that the folder does not have yet but will have, with their current paths. `contents`: what
    all weight files of the folder hold, whatever the index says; None if only some shards were opened.
    `pending_documents`: the same for JSON files that will be written. `planned`: it is what a repair would make.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    shards: tuple[str, ...]
    total_size: int | None
    problems: list[str] = field(default_factory=list)
    pending_files: Mapping[str, Path] = field(default_factory=dict)
    contents: Contents | None = None
    pending_documents: Mapping[str, JsonObject] = field(default_factory=dict)
    planned: bool = False

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config, index and headers. Raises CheckpointError if the folder holds no readable checkpoint at all."""
        if not folder.is_dir():
            raise CheckpointError(f"{shown(str(folder))} is not a folder: name a checkpoint's folder", path=folder)
        has_weights = any(os.path.lexists(folder / name) for name in CHECKPOINT_FILES)
        if not has_weights and (other := explain_folder(folder)):
            raise CheckpointError(other, path=folder)
        problems: list[str] = []
        config = ModelConfig(_read(folder / "config.json", problems))
        weight_map: JsonObject | None = None
        total_size: int | None = None
        if os.path.lexists(folder / INDEX):
            index = _read(folder / INDEX, problems)
            weight_map = index.child("weight_map")
            if not weight_map:
                raise CheckpointError(
                    f"{shown(str(folder / INDEX))} has no weight_map: restore the file", path=folder / INDEX
                )
            total_size = _total_size(index)
            shards = _shards(folder, weight_map, problems)
            headers, missing = _headers(folder, shards, problems)
            contents = contents_of(folder, config, weight_map, headers)
            remedy = "" if contents.is_whole else ": download it again"
            sentences = {name: f"the index names {shown(name)}, which is missing{remedy}" for name in missing}
            ordinary = [name for name in missing if SHARD_NAME.fullmatch(name)]
            _report(problems, ordinary, lambda name: Mendable(sentences[name]))
            _report(problems, [name for name in missing if name not in ordinary], lambda name: sentences[name])
            tensors = _tensors(headers, weight_map, problems)
            problems += beside_index(contents, config)
            _can_mend(contents, problems)
        else:
            contents = contents_of(folder, config, {}, {})
            shards, tensors = tuple(stray.name for stray in contents.strays if stray.own), contents.tensors
            _without_index(folder, contents, problems)
        size = sum(t.nbytes for t in tensors.values())
        if total_size is not None and total_size != size and all(isinstance(p, Harmless) for p in problems):
            problems.append(Harmless(f"{WRONG_TOTAL} {total_size}, the tensors have {size} bytes: {FIX}"))
        return cls(folder, config, tensors, shards, total_size, problems, contents=contents)

    @classmethod
    def open_shards(cls, folder: Path, shards: Sequence[str]) -> Checkpoint:
        """Read the config and the headers of some shards, without the index."""
        tensors = {name: t for shard in shards for name, t in read_header(folder / shard).items()}
        return cls(folder, ModelConfig(read_json(folder / "config.json")), tensors, tuple(shards), None)

    def sound(self) -> Checkpoint:
        """Return this checkpoint. Raises CheckpointError if readers cannot load it, or may load it differently."""
        return self._without([*self.fatal, *(p for p in self.problems if isinstance(p, Ambiguous))])

    def loadable(self) -> Checkpoint:
        """Return this checkpoint. Raises CheckpointError if readers cannot load it."""
        return self._without(self.fatal)

    def _without(self, hindering: Sequence[str]) -> Checkpoint:
        if hindering:
            more = f" (and {len(hindering) - 1} more: see requant inspect)" if len(hindering) > 1 else ""
            raise CheckpointError(f"{shown(str(self.folder))}: {hindering[0]}{more}", path=self.folder)
        return self

    @property
    def fatal(self) -> list[str]:
        """The problems that keep a reader from loading it.

        These are all but a wrong total_size, shards that the index does not name, and repeated keys.
        """
        return [p for p in self.problems if not isinstance(p, Harmless)]

    @property
    def has_unread(self) -> bool:
        """Whether a shard is there and cannot be read: tensors that seem to be missing may be in it."""
        return any(isinstance(p, Unread) for p in self.problems)

    @cached_property
    def head(self) -> Head | None:
        """The MTP head, or None."""
        return find_head(self.tensors, self.config)

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """The modules by name."""
        return modules_of(self.tensors.values(), self.method)

    @cached_property
    def head_modules(self) -> Mapping[str, Module]:
        """The modules of the MTP head by name; empty if there is none."""
        return modules_of((self.tensors[name] for name in (self.head.names if self.head else ())), self.method)

    @cached_property
    def method(self) -> Method | None:
        """The quantization method; None if no config names one."""
        return method_of(self.config, self.quantization)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def file(self, name: str) -> Path:
        """Return the path of a file of the checkpoint, which may not exist."""
        return self.pending_files.get(name, self.folder / name)

    def document(self, name: str) -> JsonObject | None:
        """Read a JSON file of the checkpoint; None if there is none. Raises CheckpointError if it cannot be read."""
        if name in self.pending_documents:
            return self.pending_documents[name]
        return read_json(self.file(name)) if self.file(name).is_file() else None

    @property
    def text_config(self) -> JsonObject:
        """The language model's part of the config."""
        return self.config.text

    @cached_property
    def quantization(self) -> QuantizationConfig:
        """The quantization config of config.json, otherwise of a file that a quantizer has written next to it."""
        name = self.quantization_file
        if name is None:
            return self.config.quantization
        return QuantizationConfig({**METHODS_OF_FILES.get(name, {}), **(self.document(name) or {})})

    @property
    def quantization_file(self) -> str | None:
        """The name of the file next to config.json with the quantization config; None if config.json or no file has."""
        if self.config.quantization:
            return None
        names = (name for name in QUANTIZATION_FILES if name in self.pending_documents or self.file(name).is_file())
        return next(names, None)

    @cached_property
    def reading(self) -> Reading:
        """What the quantization config says of each module."""
        from requant.tasks.checkpoint.reading import Reading  # which imports this module by way of the engines' rules

        return Reading.of(self.config, self.quantization)

    @cached_property
    def completeness(self) -> Completeness:
        """What the checkpoint lacks of what its architecture needs."""
        from requant.tasks.checkpoint.completeness import Completeness  # which imports this module

        return Completeness.of(self)


def _total_size(index: JsonObject) -> int | None:
    stated = (index.child("metadata") or JsonObject()).get("total_size")
    # The comparison is false for NaN.
    return int(stated) if isinstance(stated, int | float) and abs(stated) < 1 << 62 else None


def _shards(folder: Path, weight_map: JsonObject, problems: list[str]) -> tuple[str, ...]:
    """Return the shards that an index names, without those that must not be opened."""
    unnamed = [name for name, shard in weight_map.items() if not isinstance(shard, str)]
    _report(problems, unnamed, lambda name: f"the index names no file for {shown(name)}: restore the index")
    named = sorted({shard for shard in weight_map.values() if isinstance(shard, str)})
    if len(named) > MAX_SHARDS:
        raise CheckpointError(f"{INDEX} names {len(named):,} shards, more than any checkpoint has: restore the file")
    outside = [shard for shard in named if not stays_inside(folder, shard)]
    _report(
        problems, outside, lambda shard: f"the index names {shown(shard)}, no file of this folder: restore the index"
    )
    inside = [shard for shard in named if stays_inside(folder, shard)]
    foreign = [shard for shard in inside if not shard.endswith(".safetensors")]
    _report(problems, foreign, lambda shard: f"the index names {shown(shard)}: only safetensors shards are read")
    return tuple(shard for shard in inside if shard.endswith(".safetensors"))


def stays_inside(folder: Path, shard: str) -> bool:
    """Check whether a name is that of a file in this folder.

    The file itself may be a link, as in the Hub's cache: it is replaced and never written through. Its folder may not
    be a link that leads outside, since files are replaced and removed there.
    """
    if SHARD_NAME.fullmatch(shard):
        return True
    try:
        check_relative(shard)
    except CheckpointError:
        return False
    parent = os.path.realpath((folder / shard).parent)
    return os.path.commonpath([parent, root := os.path.realpath(folder)]) == root


def beside_index(contents: Contents, config: ModelConfig) -> list[str]:
    """Say what the weight files are that the index does not name.

    Engines read only what the index names, but transformers reads `model.safetensors` alone: see `shards`.
    """
    problems: list[str] = []
    others = {stray.name: stray.sentence() for stray in contents.strays}
    differs = any(stray.differing for stray in contents.strays if stray.name == SINGLE)
    missed = missed_by_transformers(contents, config)
    if missed is not None:
        del others[SINGLE]
        has_own = any(stray.own for stray in contents.strays if stray.name == SINGLE)
        remedy = f": {FIX_INDEX}" if contents.is_whole else ""
        what = f"{SINGLE} lies beside a sharded index: transformers reads it alone, and misses {shown(missed)}"
        problems.append(OfIndex(what + (remedy if has_own else f": {MOVE}")))
    _report(problems, list(others), lambda n: (OfIndex if n == SINGLE and differs else Harmless)(others[n]))
    return problems


def _can_mend(contents: Contents, problems: list[str]) -> None:
    """Say so if all that is wrong is solved by a new index."""
    fatal = [problem for problem in problems if not isinstance(problem, Harmless)]
    if fatal and contents.is_whole and all(isinstance(problem, Mendable) for problem in fatal):
        problems.append(Harmless(f"the index is wrong, and the shards have every tensor that it names: {FIX_INDEX}"))


def _without_index(folder: Path, contents: Contents, problems: list[str]) -> None:
    """Say what engines make of weight files without an index.

    Raises CheckpointError if no file is a checkpoint's.
    """
    strays = {stray.name: stray for stray in contents.strays}
    broken = [stray.problem for stray in strays.values() if stray.problem is not None]
    if not broken and not any(stray.own for stray in strays.values()):
        raise CheckpointError(
            f"{shown(str(folder))} has neither {INDEX} nor {SINGLE}: only safetensors checkpoints can be read",
            path=folder,
        )
    _report(problems, broken, Unread)
    lost = lost_numbers(strays)
    _report(problems, lost, lambda name: f"{shown(name)} of the series is missing: download it again")
    can_index = contents.is_whole and all(isinstance(problem, Harmless) for problem in problems)
    for name, stray in strays.items():
        for tensor in [*stray.copied, *stray.differing][:1]:
            problems.append(
                Ambiguous(f"{shown(tensor)} is in {shown(name)} and in another file, and there is no index")
            )
        for tensor in stray.foreign[:1]:
            what = (
                f"without an index engines read {shown(name)} too, and {shown(tensor)} in it is no tensor of this model"
            )
            problems.append(OfIndex(f"{what}: {MOVE}"))
    if set(strays) != {SINGLE}:
        kind, alone = (Harmless, f"{SINGLE} alone") if SINGLE in strays else (OfIndex, "none of them")
        readers = f"vLLM and SGLang read all {len(strays)} weight files, transformers reads {alone}"
        problems.append(kind(f"there is no {INDEX}: {readers}" + (f"; {FIX_INDEX}" if can_index else "")))


def _headers(
    folder: Path, shards: Sequence[str], problems: list[str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the headers that can be read, by shard, and the names of missing shards."""
    headers: dict[str, dict[str, Tensor]] = {}
    missing: list[str] = []
    broken: list[str] = []
    for shard in shards:
        try:
            headers[shard] = read_header(folder / shard)
        except FileNotFoundError:
            missing.append(shard)
        except CheckpointError as error:
            broken.append(str(error))
    _report(problems, broken, Unread)
    return headers, missing


def _tensors(headers: Headers, weight_map: JsonObject, problems: list[str]) -> dict[str, Tensor]:
    """Return the tensors that index and headers agree on."""
    tensors: dict[str, Tensor] = {}
    misplaced: list[str] = []
    for shard, header in headers.items():
        for name, tensor in header.items():
            if weight_map.get(name) == shard:
                tensors[name] = tensor
            else:
                misplaced.append(_misplaced(name, shard, weight_map))
    _report(problems, misplaced, Mendable)
    lost = [n for n, s in weight_map.items() if isinstance(s, str) and s in headers and n not in tensors]
    where = {name: shown(str(weight_map[name])) for name in lost}
    _report(problems, lost, lambda n: Mendable(f"the index names {shown(n)}, which is not in {where[n]}"))
    return tensors


def _misplaced(name: str, shard: str, weight_map: JsonObject) -> str:
    if name not in weight_map:
        return f"{shown(name)} is in {shown(shard)} but not in the index"
    return f"{shown(name)} is in {shown(shard)}, but the index says {shown(str(weight_map[name]))}"


def _report(problems: list[str], names: Sequence[str], sentence: Callable[[str], str]) -> None:
    """Add a sentence about each name; for more than MAX_PROBLEMS_OF_KIND names, one that says how many there are."""
    problems += [sentence(name) for name in names[:MAX_PROBLEMS_OF_KIND]]
    if len(names) > MAX_PROBLEMS_OF_KIND:
        problems.append(
            type(problems[-1])(f"{len(names) - MAX_PROBLEMS_OF_KIND:,} more problems are like this: {problems[-1]}")
        )


def _read(path: Path, problems: list[str]) -> JsonObject:
    """Read a JSON object, and add a problem if a key is repeated in it."""
    document, repeated = parse_json(path)
    if repeated:
        more = f" (and {len(repeated) - 1:,} more such keys)" if len(repeated) > 1 else ""
        kind = OfIndex if path.name == INDEX else Ambiguous
        problems.append(kind(f"{path.name} says {shown(repeated[0])} twice{more}: keep one of the two"))
    return document


def read_json(path: Path) -> JsonObject:
    """Read a JSON object from a file of a checkpoint. Raises CheckpointError, which names the file."""
    return parse_json(path)[0]


def parse_json(path: Path) -> tuple[JsonObject, list[str]]:
    """Read a JSON object as `read_json`, and for each object with a repeated key the first such key."""
    file = shown(str(path))
    try:
        size = size_of(path)
        if size > MAX_JSON_BYTES:
            limit = MAX_JSON_BYTES >> 20
            raise CheckpointError(f"{file} is larger than {limit} MiB: not a checkpoint's file", path=path)
        with path.open("rb") as stream:
            document, repeated = parse(
                stream.read(size)
            )  # files of the kernel may have more bytes than their size says
        check_depth(document)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: name a checkpoint's folder", path=path) from error
    except CheckpointError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        explained = explain_content(beginning_of(path) if size else b"")
        raise CheckpointError(f"{file} {explained or f'is not JSON ({error}): restore the file'}", path=path) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{file} is not a JSON object: restore the file", path=path)
    return JsonObject(document), repeated
