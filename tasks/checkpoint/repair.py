"""Repairs the MTP head of an existing checkpoint in place.

First the desired checkpoint is worked out, from headers and the data of the head alone. Then the files that differ are
written and replaced in one step. If no file differs, nothing is changed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from requant.tasks.checkpoint.atomic_swap import finish_interrupted, install, locked, remove_stages, staged
from requant.tasks.checkpoint.checkpoint import (
    INDEX,
    QUANTIZATION,
    QUANTIZATION_FILES,
    SINGLE,
    Ambiguous,
    Checkpoint,
    read_json,
)
from requant.tasks.checkpoint.compat import FIX, draft_problem, verdicts
from requant.tasks.checkpoint.config import JsonObject
from requant.tasks.checkpoint.document import EngineVerdict, MtpFixDocument
from requant.tasks.checkpoint.head import HEAD_SHARD, Tensors, dequantized_head, head_tensors
from requant.tasks.checkpoint.header import Tensor, read_header
from requant.tasks.checkpoint.inventory import missing_parts
from requant.tasks.checkpoint.mtp import find_head, with_head_entries
from requant.tasks.checkpoint.untrusted import parse
from requant.tasks.checkpoint.writer import index_of, place_shard, write_file, write_json
from requant.tasks.errors import CheckpointError

RESTORED_SHARD = "model-restored-{:05d}.safetensors"
# Files for tokenizer, processor and generation have one of these suffixes, and are none of NOT_AUXILIARY.
AUXILIARY_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken")
NOT_AUXILIARY = {"config.json", INDEX, *QUANTIZATION_FILES}


@dataclass(frozen=True)
class RepairSource:
    """A base to take the head from. `fetch` makes the data of tensors and files available in its folder."""

    folder: Path
    fetch: Callable[[Iterable[Tensor], Iterable[str]], None] = lambda tensors, files: None


@dataclass
class RepairPlan:
    """The differences between a checkpoint and the desired one.

    `shards`, `linked`, `documents` and `copied` are files to write, by name: from tensors, as a link to an existing
    shard, as JSON, and as a copy of a file of the base. `removed` are names of files, `restored` names of the head's
    tensors.
    """

    shards: dict[str, list[Tensor]] = field(default_factory=dict)
    linked: dict[str, str] = field(default_factory=dict)
    documents: dict[str, JsonObject] = field(default_factory=dict)
    copied: dict[str, Path] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    # What the engines do with the checkpoint as it is and as it will be; empty if nothing differs.
    before: dict[str, EngineVerdict] = field(default_factory=dict)
    after: dict[str, EngineVerdict] = field(default_factory=dict)

    @property
    def written(self) -> list[str]:
        return sorted([*self.shards, *self.linked, *self.documents, *self.copied])


def repair(
    folder: Path, base: RepairSource | None, *, precision: str = "keep", dry_run: bool = False
) -> MtpFixDocument:
    """Give a checkpoint the MTP head of its base, and index, configs and auxiliary files that fit.

    `precision`: `keep` (bit for bit), int8 or int4. Without a base, a quantized head that no engine can load is
    dequantized; the precision that its quantization lost stays lost.

    Raises CheckpointError if a base is needed, if base and checkpoint do not fit each other, for an unknown
    quantization method, and if an engine would do less with the result than with the present checkpoint.
    """
    folder = folder.resolve()
    with locked(folder):
        if not dry_run:
            finish_interrupted(folder)
        plan = plan_repair(folder, base, precision)
        _check_engines(plan, folder, precision)
        if not dry_run:
            remove_stages(folder)
        if plan.written and not dry_run:
            with staged(folder) as stage:
                _write(plan, folder, stage)
                install(stage, folder, plan.removed)
    return MtpFixDocument(
        changed=bool(plan.written) and not dry_run,
        tensors_restored=len(plan.restored),
        source="base" if base else "dequantized",
        writes=plan.written,
        removes=[name for name in plan.removed if name not in plan.written],
        engines=plan.after if dry_run and plan.written else verdicts(Checkpoint.open(folder)),
    )


def plan_repair(folder: Path, base: RepairSource | None, precision: str) -> RepairPlan:
    """Work out what `repair` would do, from headers, configs and the data of the head."""
    checkpoint = _open_by_headers(folder)
    source = Checkpoint.open(base.folder).sound() if base else None
    if source is not None:
        _check_base(checkpoint, source)
    wanted = _wanted_head(checkpoint, source, precision)
    plan = RepairPlan()
    if base is not None and source is not None:
        plan.copied = {n: base.folder / n for n in _auxiliary_files(base.folder) if not (folder / n).is_file()}
        base.fetch((source.tensors[n] for n in (source.head.names if source.head else ())), plan.copied)
    old = _old_head(checkpoint, source)
    plan.restored = _differing(checkpoint, wanted, old)
    layout = _by_shard(checkpoint.tensors.values())
    if plan.restored:
        layout = _replace_head(plan, layout, wanted, old)
    if plan.restored or (folder / INDEX).exists():
        old_index = read_json(folder / INDEX) if (folder / INDEX).exists() else None
        _plan_document(plan, folder, INDEX, index_of(layout, old_index))
        named = set(checkpoint.shards) - set(layout) - set(plan.removed)
        plan.removed += sorted(shard for shard in named if os.path.lexists(folder / shard))
    tensors = {tensor.name: tensor for shard in layout.values() for tensor in shard}
    after = _plan_configs(plan, replace(checkpoint, tensors=tensors, problems=[], pending_files=plan.copied), source)
    missing = missing_parts(after, after.head) if after.head else []
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is missing from the MTP head: name the base with --base")
    if plan.written:
        plan.before, plan.after = verdicts(Checkpoint.open(folder)), verdicts(after)
    return plan


def _check_engines(plan: RepairPlan, folder: Path, precision: str) -> None:
    """Check that no engine stops loading the checkpoint or drafting from it. Raises CheckpointError if one would.

    If the user asks for a quantized head, one engine that drafts from it is enough.
    """
    asked = precision != "keep" and any(verdict.mtp for verdict in plan.after.values())
    for engine, before in plan.before.items():
        after = plan.after[engine]
        stops_loading, stops_drafting = before.loads and not after.loads, before.mtp and not after.mtp
        if stops_loading or (stops_drafting and not asked):
            lost = "load it" if stops_loading else "draft from it"
            reason = after.reason.removesuffix(f": {FIX}")
            raise CheckpointError(
                f"{folder}: {engine} would no longer {lost} after the repair ({reason}): nothing was changed; "
                "keep the checkpoint as it is, or name another base"
            )


def _open_by_headers(folder: Path) -> Checkpoint:
    """Open a checkpoint, and trust the headers of its shards rather than its index.

    An index that contradicts the headers can be repaired, and so can a missing or broken shard of the head, as long as
    every other tensor that the index names exists exactly once. Raises CheckpointError for any other problem.
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
    head = find_head(weight_map, checkpoint.config)
    lost = set(weight_map) - set(tensors) - set(head.names if head else ())
    twice = len(tensors) < sum(len(header) for header in headers.values())  # only the index says which one counts
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
    """Return the tensors that the head should have. Without a base, a head that engines load stays as it is."""
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
    """Return the names of all tensors that are under the prefixes of the checkpoint's or the base's head."""
    heads = (owner.head for owner in (checkpoint, base) if owner is not None)
    prefixes = {prefix for head in heads if head for prefix in head.prefixes}
    return {name for name in checkpoint.tensors if any(name.startswith(f"{prefix}.") for prefix in prefixes)}


def _differing(checkpoint: Checkpoint, wanted: Tensors, old: set[str]) -> list[str]:
    """Return the wanted tensors that the checkpoint lacks or has differently; without any, the superfluous ones."""
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
    for chunk in ours:  # the chunks of the two may have different sizes
        while len(rest) < len(chunk):
            rest += next(theirs)
        if rest[: len(chunk)] != chunk:
            return False
        rest = rest[len(chunk) :]
    return True


def _by_shard(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    layout: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        layout.setdefault(tensor.path.name, []).append(tensor)
    return layout


def _replace_head(
    plan: RepairPlan, layout: dict[str, list[Tensor]], wanted: Tensors, old: set[str]
) -> dict[str, list[Tensor]]:
    """Move the head to a shard of its own: plan the new shards, and return the complete layout.

    A shard that held a part of the old head is written again without it.
    """
    after: dict[str, list[Tensor]] = {}
    for shard, tensors in layout.items():
        rest = [t for t in tensors if t.name not in old]
        shrinks = len(rest) < len(tensors)
        name = _free_name(layout, after) if shrinks or shard == SINGLE else shard
        if rest:
            after[name] = rest
        if rest and shrinks:
            plan.shards[name] = rest
        elif rest and name != shard:
            plan.linked[name] = shard
        if name != shard and shard != HEAD_SHARD:
            plan.removed.append(shard)
    plan.shards[HEAD_SHARD] = after[HEAD_SHARD] = list(wanted.values())
    return after


def _free_name(*taken: Iterable[str]) -> str:
    """Return a new name for a shard that loses tensors, so that the old index stays valid until it is replaced."""
    used = {name for names in taken for name in names}
    return next(name for number in itertools.count(1) if (name := RESTORED_SHARD.format(number)) not in used)


def _plan_configs(plan: RepairPlan, checkpoint: Checkpoint, base: Checkpoint | None) -> Checkpoint:
    """Plan configs that promise the head's layers and say how its tensors are stored.

    Returns the checkpoint with these configs.
    """
    folder = checkpoint.folder
    config = checkpoint.config.with_mtp_layers_of(base.config) if base else checkpoint.config
    checkpoint = replace(checkpoint, config=config)
    quantization = checkpoint.quantization
    head = checkpoint.head
    if quantization:
        if head is not None and (plan.restored or draft_problem(checkpoint) is not None):
            try:
                quantization = with_head_entries(quantization, head, checkpoint.tensors)
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: nothing was changed: {error}") from error
        config = config.with_quantization(quantization)
        by_auto_round = quantization.method == "auto-round"  # auto-round writes both files
        if (folder / QUANTIZATION).exists() or (plan.restored and by_auto_round):
            _plan_document(plan, folder, QUANTIZATION, quantization)
    _plan_document(plan, folder, "config.json", config)
    return replace(checkpoint, config=config)


def _plan_document(plan: RepairPlan, folder: Path, name: str, document: JsonObject) -> None:
    if not (folder / name).exists() or parse((folder / name).read_bytes()) != (document, []):
        plan.documents[name] = document


def _auxiliary_files(folder: Path) -> list[str]:
    files = [path.name for path in folder.iterdir() if path.is_file() and path.suffix in AUXILIARY_SUFFIXES]
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
