"""Repairs the MTP head of a checkpoint that was made elsewhere, in place.

What the checkpoint should be is worked out first, from headers and the head's bytes alone; what differs is written and
installed at one stroke. Nothing differs, nothing is touched.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.atomic_swap import clear, finish, install, locked, staged
from requant.tasks.checkpoint.checkpoint import BESIDE, INDEX, QUANTIZATION, SINGLE, Ambiguous, Checkpoint, read_json
from requant.tasks.checkpoint.compat import FIX, draft_problem, verdicts
from requant.tasks.checkpoint.head import HEAD_SHARD, Tensors, dequantized_head, head_tensors
from requant.tasks.checkpoint.header import Tensor, read_header
from requant.tasks.checkpoint.inventory import missing_parts
from requant.tasks.checkpoint.mtp import LAYER_COUNTS, find_head, with_head_entries
from requant.tasks.checkpoint.untrusted import parse
from requant.tasks.checkpoint.writer import index_of, place_shard, write_file, write_json
from requant.tasks.errors import CheckpointError

RESTORED = "model-restored-{:05d}.safetensors"
# Files that a tokenizer, a processor or generation reads; config, index and what a quantizer writes are no such files.
AUXILIARY = (".json", ".txt", ".jinja", ".model", ".tiktoken")
NOT_AUXILIARY = {"config.json", INDEX, *BESIDE}
Verdicts = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RepairSource:
    """Where the head comes from. `bring` makes the data of these tensors and files readable below the folder."""

    folder: Path
    bring: Callable[[Iterable[Tensor], Iterable[str]], None] = lambda tensors, files: None


@dataclass
class RepairPlan:
    """What differs from what should be. `restored` are names of the head's tensors."""

    shards: dict[str, list[Tensor]] = field(default_factory=dict)
    linked: dict[str, str] = field(default_factory=dict)  # new name to old
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    copied: dict[str, Path] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    before: Verdicts = field(default_factory=dict)  # the engines' of the checkpoint as it is, if there is a difference
    after: Verdicts = field(default_factory=dict)  # the engines' of the checkpoint as it will be

    @property
    def written(self) -> list[str]:
        return sorted([*self.shards, *self.linked, *self.documents, *self.copied])


def repair(
    folder: Path, base: RepairSource | None, *, precision: str = "keep", dry_run: bool = False
) -> dict[str, Any]:
    """Give `folder` the head of its base (bit for bit, or packed to `precision`: int8, int4), and index, configs and
    auxiliary files that fit. Without a base, a packed head that no engine can load is dequantized, which loses what the
    packing lost. Returns the document of `requant mtp-fix --json`.

    Raises CheckpointError where a base is needed, if base and checkpoint do not fit each other, for a quantization
    method whose words are not known, and where an engine would make less of the result than of what is there.
    """
    folder = folder.resolve()
    with locked(folder):
        if not dry_run:
            finish(folder)
        plan = plan_repair(folder, base, precision)
        _check_better(plan, folder, precision)
        if not dry_run:
            clear(folder)
        if plan.written and not dry_run:
            with staged(folder) as stage:
                _write(plan, folder, stage)
                install(stage, folder, plan.removed)
    return {
        "changed": bool(plan.written) and not dry_run,
        "tensors_restored": len(plan.restored),
        "source": "base" if base else "dequantized",
        "writes": plan.written,
        "removes": [name for name in plan.removed if name not in plan.written],
        "engines": plan.after if dry_run and plan.written else verdicts(Checkpoint.open(folder)),
    }


def plan_repair(folder: Path, base: RepairSource | None, precision: str) -> RepairPlan:
    """What `repair` would do, from headers, configs and the bytes of the head."""
    checkpoint = _readable(folder)
    source = Checkpoint.open(base.folder).sound() if base else None
    if source is not None:
        _check_base(checkpoint, source)
    wanted = _wanted_head(checkpoint, source, precision)
    plan = RepairPlan()
    if base is not None and source is not None:
        plan.copied = {n: base.folder / n for n in _auxiliary(base.folder) if not (folder / n).is_file()}
        base.bring((source.tensors[n] for n in (source.head.names if source.head else ())), plan.copied)
    old = _old_head(checkpoint, source)
    plan.restored = _differing(checkpoint, wanted, old)
    layout = _layout_of(checkpoint.tensors.values())
    if plan.restored:
        layout = _replace_head(plan, layout, wanted, old)
    if plan.restored or (folder / INDEX).exists():
        _put(plan, folder, INDEX, _index(folder, layout))
        named = set(checkpoint.shards) - set(layout) - set(plan.removed)
        plan.removed += sorted(shard for shard in named if os.path.lexists(folder / shard))
    tensors = {tensor.name: tensor for shard in layout.values() for tensor in shard}
    after = _put_configs(plan, replace(checkpoint, tensors=tensors, problems=[], coming=plan.copied), source)
    missing = missing_parts(after, after.head) if after.head else []
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is missing from the MTP head: name the base with --base")
    if plan.written:
        plan.before, plan.after = verdicts(Checkpoint.open(folder)), verdicts(after)
    return plan


def _check_better(plan: RepairPlan, folder: Path, precision: str) -> None:
    """Raises CheckpointError if an engine would no longer load the checkpoint, or no longer draft from it.

    A head that is asked for in fewer bits is no repair: one engine that drafts from it is enough.
    """
    asked = precision != "keep" and any(verdict["mtp"] for verdict in plan.after.values())
    for engine, before in plan.before.items():
        after = plan.after[engine]
        if any(_rank(after[what]) < _rank(before[what]) for what in (("loads",) if asked else ("loads", "mtp"))):
            lost = "load it" if _rank(after["loads"]) < _rank(before["loads"]) else "draft from it"
            reason = after["reason"].removesuffix(f": {FIX}")
            raise CheckpointError(
                f"{folder}: {engine} would no longer {lost} after the repair ({reason}): nothing was changed; "
                "keep the checkpoint as it is, or name another base"
            )


def _rank(verdict: bool | None) -> int:
    """No is the worst verdict, and yes is better than none at all."""
    return {False: 0, None: 1, True: 2}[verdict]


def _readable(folder: Path) -> Checkpoint:
    """The checkpoint as its shards' headers have it.

    An index that contradicts them is a thing to repair, and so is a lost or broken shard of the head, as long as each
    other tensor that the index names is there once; anything else stops here.
    """
    checkpoint = Checkpoint.open(folder)
    ambiguous = [p for p in checkpoint.problems if isinstance(p, Ambiguous) and INDEX not in p]
    if ambiguous or not (folder / INDEX).exists():
        return checkpoint.sound()
    if not checkpoint.fatal:
        return checkpoint
    if (folder / SINGLE).exists() and SINGLE not in checkpoint.shards:
        return checkpoint.sound()
    headers: dict[str, dict[str, Tensor]] = {}
    for shard in checkpoint.shards:
        with contextlib.suppress(CheckpointError, OSError):
            headers[shard] = read_header(folder / shard)
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    weight_map = read_json(folder / INDEX)["weight_map"]
    head = find_head(weight_map, checkpoint.text_config)
    lost = set(weight_map) - set(tensors) - set(head.names if head else ())
    twice = len(tensors) < sum(len(header) for header in headers.values())  # only the index could tell which one counts
    return checkpoint.sound() if lost or twice else replace(checkpoint, tensors=tensors, problems=[])


def _check_base(checkpoint: Checkpoint, base: Checkpoint) -> None:
    if base.head is None:
        raise CheckpointError(f"the base {base.folder} has no MTP head: there is nothing to restore")
    for key in ("hidden_size", "vocab_size", "num_hidden_layers"):
        ours, theirs = checkpoint.text_config.get(key), base.text_config.get(key)
        if ours != theirs:
            raise CheckpointError(
                f"{base.folder} is not the base of {checkpoint.folder}: {key} is {theirs} there and {ours} here"
            )
    for name, tensor in checkpoint.tensors.items():
        there = base.tensors.get(name)
        if there is not None and there.shape != tensor.shape:
            raise CheckpointError(
                f"{base.folder} is not the base of {checkpoint.folder}: {name} is {list(there.shape)} there and "
                f"{list(tensor.shape)} here"
            )


def _wanted_head(checkpoint: Checkpoint, base: Checkpoint | None, precision: str) -> Tensors:
    """The head as it should be; what is there already, where nothing is wrong with it."""
    if base is not None:
        return head_tensors(base, precision, checkpoint.quantization)
    if precision != "keep":
        raise CheckpointError(f"a head with {precision} is made from the base's: name it with --base")
    head = checkpoint.head
    if head is None:
        raise CheckpointError(f"{checkpoint.folder} has no MTP head: name the base with --base to restore it")
    if draft_problem(checkpoint) is None:
        return {name: checkpoint.tensors[name] for name in head.names}
    return dequantized_head(checkpoint)


def _old_head(checkpoint: Checkpoint, base: Checkpoint | None) -> set[str]:
    """Every tensor of the checkpoint below the head's prefixes, its own or the base's."""
    prefixes = {p for each in (checkpoint, base) if each and each.head for p in each.head.prefixes}
    return {name for name in checkpoint.tensors if any(name.startswith(f"{prefix}.") for prefix in prefixes)}


def _differing(checkpoint: Checkpoint, wanted: Tensors, old: set[str]) -> list[str]:
    """The wanted tensors that the checkpoint has not, or not bit for bit; else those that it has too many."""
    differing = []
    for name, tensor in wanted.items():
        ours = checkpoint.tensors.get(name)
        same = ours is not None and (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        if not same or ours is None or (ours != tensor and not _same_bytes(ours, tensor)):
            differing.append(name)
    return differing or sorted(old - set(wanted))


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.nbytes != other.nbytes:
        return False
    ours, theirs = one.chunks(), other.chunks()
    rest = b""
    for chunk in ours:  # the two need not come in chunks of one size
        while len(rest) < len(chunk):
            rest += next(theirs)
        if rest[: len(chunk)] != chunk:
            return False
        rest = rest[len(chunk) :]
    return True


def _layout_of(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    layout: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        layout.setdefault(tensor.path.name, []).append(tensor)
    return layout


def _replace_head(
    plan: RepairPlan, layout: dict[str, list[Tensor]], wanted: Tensors, old: set[str]
) -> dict[str, list[Tensor]]:
    """The layout with the wanted head in a shard of its own; shards that held a part of the old one lose it."""
    after: dict[str, list[Tensor]] = {}
    for shard, tensors in layout.items():
        rest = [t for t in tensors if t.name not in old]
        cut = len(rest) < len(tensors)
        name = _free_name(layout, after) if cut or shard == SINGLE else shard
        if rest:
            after[name] = rest
        if rest and cut:
            plan.shards[name] = rest
        elif rest and name != shard:
            plan.linked[name] = shard
        if name != shard and shard != HEAD_SHARD:
            plan.removed.append(shard)
    plan.shards[HEAD_SHARD] = after[HEAD_SHARD] = list(wanted.values())
    return after


def _free_name(*taken: Iterable[str]) -> str:
    """A shard that loses tensors gets a new name, so that the old index stays true until the new one is there."""
    used = {name for names in taken for name in names}
    return next(name for number in itertools.count(1) if (name := RESTORED.format(number)) not in used)


def _index(folder: Path, layout: dict[str, list[Tensor]]) -> dict[str, Any]:
    """The index of a layout; what else stood in the old one stays."""
    old = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    new = index_of(layout)
    metadata = old.get("metadata")
    new["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), **new["metadata"]}
    return {**old, **new}


def _put_configs(plan: RepairPlan, checkpoint: Checkpoint, base: Checkpoint | None) -> Checkpoint:
    """Configs that promise the head's layers and say how its tensors are stored, in words that the engines read.

    Returns the checkpoint as it will be.
    """
    folder = checkpoint.folder
    config = _with_layer_count(checkpoint.config, base) if base else checkpoint.config
    checkpoint = replace(checkpoint, config=config)
    quantization = checkpoint.quantization
    head = checkpoint.head
    if quantization:
        if head is not None and (plan.restored or draft_problem(checkpoint) is not None):
            try:
                quantization = with_head_entries(quantization, head, checkpoint.tensors)
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: nothing was changed: {error}") from error
        config = {**config, "quantization_config": quantization}
        by_auto_round = quantization.get("quant_method") == "auto-round"  # it writes both
        if (folder / QUANTIZATION).exists() or (plan.restored and by_auto_round):
            _put(plan, folder, QUANTIZATION, quantization)
    _put(plan, folder, "config.json", config)
    return replace(checkpoint, config=config)


def _with_layer_count(config: dict[str, Any], base: Checkpoint) -> dict[str, Any]:
    """The config with the base's number of MTP layers, where the base's config has it."""
    counts = {key: base.text_config[key] for key in LAYER_COUNTS if key in base.text_config}
    if isinstance(config.get("text_config"), dict) and base.text_config is not base.config:
        return {**config, "text_config": {**config["text_config"], **counts}}
    return {**config, **counts}


def _put(plan: RepairPlan, folder: Path, name: str, document: dict[str, Any]) -> None:
    if not (folder / name).exists() or parse((folder / name).read_bytes()) != (document, []):
        plan.documents[name] = document


def _auxiliary(folder: Path) -> list[str]:
    files = [path.name for path in folder.iterdir() if path.is_file() and path.suffix in AUXILIARY]
    return sorted(name for name in files if name not in NOT_AUXILIARY and not name.startswith("."))


def _write(plan: RepairPlan, folder: Path, stage: Path) -> None:
    for shard, tensors in plan.shards.items():
        place_shard(stage, shard, tensors)
    for name, old in plan.linked.items():
        (stage / name).hardlink_to((folder / old).resolve())
    for name, document in plan.documents.items():
        write_json(stage, name, document)
    for name, path in plan.copied.items():
        write_file(stage, name, [path.read_bytes()])
