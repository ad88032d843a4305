"""Repairs the MTP head of an existing checkpoint in place.

Plan the target checkpoint from headers and head tensors, then write the files that differ. They replace the old ones in
one step if the file system allows it (see `atomic_swap`). If no file differs, nothing is changed.
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
    parse_json,
    read_json,
)
from requant.tasks.checkpoint.compat import Judgement, draft_problem, verdicts
from requant.tasks.checkpoint.config import HeadPrecision, JsonObject
from requant.tasks.checkpoint.document import MtpFixDocument
from requant.tasks.checkpoint.exclusions import with_head_entries
from requant.tasks.checkpoint.head import HEAD_SHARD, NAME_BASE, Tensors, dequantized_head, head_tensors
from requant.tasks.checkpoint.header import Tensor, read_header
from requant.tasks.checkpoint.inventory import missing_parts
from requant.tasks.checkpoint.mtp import find_head
from requant.tasks.checkpoint.writer import Computed, Layout, index_of, place_shard, write_file, write_json
from requant.tasks.errors import CheckpointError

RESTORED_SHARD = "model-restored-{:05d}.safetensors"
# Files for tokenizer, processor and generation have one of these suffixes, and are none of NOT_AUXILIARY.
AUXILIARY_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken")
NOT_AUXILIARY = {"config.json", INDEX, *QUANTIZATION_FILES}

Shards = dict[str, list[Tensor]]  # by name, with their tensors


@dataclass(frozen=True)
class RepairSource:
    """A checkpoint to repair, or the base to take the head from.

    `fetch` downloads the data of tensors and files to the folder of one that is on the Hub, whose `name` is then
    `repo_id@sha`.
    """

    folder: Path
    fetch: Callable[[Iterable[Tensor], Iterable[str]], None] = lambda tensors, files: None
    name: str = ""

    def fetch_own(self, tensors: Iterable[Tensor]) -> None:
        """Download the data of those tensors that are in this folder."""
        self.fetch([t for t in tensors if t.path.is_relative_to(self.folder)], ())


@dataclass
class RepairPlan:
    """What a repair has to do.

    `layout` has every shard of the target checkpoint with its tensors, by name. `shards`, `links`, `documents` and
    `copies` are files to write, by name: from tensors, as a link to an existing shard, as JSON, and as a copy of a file
    of the base. `to_remove` are names of files, `to_restore` those of the head's tensors that differ. `head_source` are
    the stored tensors of the head, of which those that are computed are made.
    """

    layout: Shards
    shards: Shards = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    documents: dict[str, JsonObject] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    to_remove: list[str] = field(default_factory=list)
    to_restore: list[str] = field(default_factory=list)
    head_source: list[Tensor] = field(default_factory=list)
    replaces_head: bool = False
    # What keeps engines from using the checkpoint as it is, and the target; None if there is nothing to write.
    present: Judgement | None = None
    target: Judgement | None = None

    @property
    def to_write(self) -> list[str]:
        return sorted([*self.shards, *self.links, *self.documents, *self.copies])

    @property
    def sizes(self) -> dict[str, int]:
        """The size in bytes of each file that has to be written, by name. A link needs no data."""
        copies = {name: path.stat().st_size for name, path in self.copies.items()}
        return Layout(self.shards, self.documents).sizes | dict.fromkeys(self.links, 0) | copies

    @property
    def reads(self) -> list[Tensor]:
        """The stored tensors whose data is needed to write the shards."""
        return _stored((tensor for shard in self.shards.values() for tensor in shard), self.head_source)


def repair(
    folder: Path, base: RepairSource | None, *, precision: HeadPrecision = "keep", dry_run: bool = False
) -> MtpFixDocument:
    """Give a checkpoint the MTP head of its base, and index, configs and auxiliary files that fit.

    `precision`: `keep` (bit for bit), int8 or int4. Without a base, a quantized head is dequantized unless both vLLM
    and SGLang would draft with it; the precision that its quantization lost stays lost.

    Raises CheckpointError if a base is needed, if base and checkpoint do not fit each other, for an unknown
    quantization method, and if an engine would stop loading the checkpoint or drafting with it.
    """
    folder = folder.resolve()
    with locked(folder):
        if not dry_run:
            finish_interrupted(folder)
        plan = plan_repair(RepairSource(folder), base, precision)
        if not dry_run:
            remove_stages(folder)
        if plan.to_write and not dry_run:
            if base is not None:
                base.fetch_own(plan.reads)
            with staged(folder) as stage:
                write_repair(plan, folder, stage)
                install(stage, folder, plan.to_remove)
    return MtpFixDocument(
        changed=bool(plan.to_write) and not dry_run,
        tensors_restored=len(plan.to_restore),
        source="base" if base else "dequantized",
        writes=plan.to_write,
        removes=[name for name in plan.to_remove if name not in plan.to_write],
        engines=plan.target.verdicts if dry_run and plan.target else verdicts(Checkpoint.open(folder)),
    )


def plan_repair(target: RepairSource, base: RepairSource | None, precision: HeadPrecision) -> RepairPlan:
    """Plan what `repair` has to do, from headers, configs and the data of heads that differ in nothing else.

    That data and the auxiliary files that the folder lacks are downloaded (`RepairSource.fetch`). What the shards are
    written from is not: `RepairPlan.reads`. Raises CheckpointError as `repair` does.
    """
    folder = target.folder
    checkpoint = _open_by_headers(folder)
    source = Checkpoint.open(base.folder).sound() if base else None
    if source is not None:
        _check_fits(checkpoint, source)
    wanted = _wanted_head(checkpoint, source, precision)
    copies: dict[str, Path] = {}
    if base is not None and source is not None:
        copies = {name: base.folder / name for name in _auxiliary_files(base.folder) if not (folder / name).is_file()}
        base.fetch((), copies)
    owner = source or checkpoint
    head_source = [owner.tensors[name] for name in (owner.head.names if owner.head else ())]
    alike = [ours for name, tensor in wanted.items() if (ours := checkpoint.tensors.get(name)) and _alike(ours, tensor)]
    to_compare = [*alike, *_stored((wanted[tensor.name] for tensor in alike), head_source)]
    for place in (target, base):
        if place is not None:
            place.fetch_own(to_compare)
    present_names = _present_head(checkpoint, source)
    differing = _differing(checkpoint, wanted)
    plan = RepairPlan(_by_shard(folder, checkpoint.tensors.values()))
    if differing or present_names - set(wanted):
        plan = _replace_head(plan.layout, wanted, present_names)
    plan.copies, plan.to_restore, plan.head_source = copies, differing, head_source
    if plan.replaces_head or (folder / INDEX).exists():
        old_index = read_json(folder / INDEX) if (folder / INDEX).exists() else None
        _plan_document(plan, folder, INDEX, index_of(plan.layout, old_index))
        unnamed = set(checkpoint.shards) - set(plan.layout) - set(plan.to_remove)
        plan.to_remove += sorted(shard for shard in unnamed if os.path.lexists(folder / shard))
    tensors = {tensor.name: tensor for shard in plan.layout.values() for tensor in shard}
    with_new_head = replace(checkpoint, tensors=tensors, problems=[], pending_files=copies)
    repaired = _plan_configs(plan, with_new_head, source)
    missing = missing_parts(repaired, repaired.head) if repaired.head else []
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is missing from the MTP head: {NAME_BASE}")
    if plan.to_write:
        plan.present, plan.target = Judgement.of(Checkpoint.open(folder)), Judgement.of(repaired)
        _check_engines(folder, plan.present, plan.target, precision)
    return plan


def _stored(tensors: Iterable[Tensor], head_source: Iterable[Tensor]) -> list[Tensor]:
    """Return the stored tensors whose data these tensors have. Those that are computed are made of the head's."""
    wanted = list(tensors)
    made = head_source if any(isinstance(tensor, Computed) for tensor in wanted) else ()
    return list(dict.fromkeys([*(tensor for tensor in wanted if not isinstance(tensor, Computed)), *made]))


def _check_engines(folder: Path, present: Judgement, target: Judgement, precision: HeadPrecision) -> None:
    """Check that no engine stops loading the checkpoint or drafting with it. Raises CheckpointError if one would.

    If the user asks for a quantized head, one engine that drafts with it is enough.
    """
    asked = precision != "keep" and any(verdict.mtp for verdict in target.verdicts.values())
    for engine, verdict in target.verdicts.items():
        now = present.verdicts[engine]
        stops_loading, stops_drafting = now.loads and not verdict.loads, now.mtp and not verdict.mtp
        if stops_loading or (stops_drafting and not asked):
            lost = "load it" if stops_loading else "draft from it"
            reason = target.loading[engine] or target.drafting[engine]
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


def _check_fits(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Check that a base has a head and the checkpoint's sizes and shapes. Raises CheckpointError if not."""
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


def _wanted_head(checkpoint: Checkpoint, base: Checkpoint | None, precision: HeadPrecision) -> Tensors:
    """Return the tensors that the head should have.

    Without a base, a quantized head stays as it is only if vLLM and SGLang draft with it.
    """
    if base is not None:
        return head_tensors(base, precision, checkpoint.quantization)
    if precision != "keep":
        raise CheckpointError(f"a head with {precision} is made from the base's: {NAME_BASE}")
    head = checkpoint.head
    if head is None:
        raise CheckpointError(f"{checkpoint.folder} has no MTP head: {NAME_BASE} to restore it")
    if draft_problem(checkpoint) is None:
        return {name: checkpoint.tensors[name] for name in head.names}
    return dequantized_head(checkpoint)


def _present_head(checkpoint: Checkpoint, base: Checkpoint | None) -> set[str]:
    """Return the checkpoint's tensors under the prefixes of its own head or of the base's, by name."""
    heads = (owner.head for owner in (checkpoint, base) if owner is not None)
    prefixes = {prefix for head in heads if head for prefix in head.prefixes}
    return {name for name in checkpoint.tensors if any(name.startswith(f"{prefix}.") for prefix in prefixes)}


def _differing(checkpoint: Checkpoint, wanted: Tensors) -> list[str]:
    """Return the names of the wanted tensors that the checkpoint lacks or has differently."""
    differing = []
    for name, tensor in wanted.items():
        ours = checkpoint.tensors.get(name)
        if ours is None or (ours != tensor and not (_alike(ours, tensor) and _same_bytes(ours, tensor))):
            differing.append(name)
    return differing


def _alike(one: Tensor, other: Tensor) -> bool:
    return one != other and (one.dtype, one.shape) == (other.dtype, other.shape)


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


def _by_shard(folder: Path, tensors: Iterable[Tensor]) -> Shards:
    """Group tensors by their shard, whose name is its path in the folder."""
    layout: Shards = {}
    for tensor in tensors:
        layout.setdefault(tensor.path.relative_to(folder).as_posix(), []).append(tensor)
    return layout


def _replace_head(layout: Shards, wanted: Tensors, present_names: set[str]) -> RepairPlan:
    """Plan a shard for the wanted head, and the other shards without the tensors of the present head.

    A shard that loses tensors gets a new name, so that the old index stays valid until it is replaced. Only a shard of
    HEAD_SHARD's name with nothing but the head may be replaced before the index: the next repair restores a head that
    index and shard disagree about, but no other tensor.
    """
    plan = RepairPlan({}, replaces_head=True)
    only_head = all(tensor.name in present_names for tensor in layout.get(HEAD_SHARD, ()))
    head_shard = HEAD_SHARD if only_head else _free_name(layout)
    for shard, tensors in layout.items():
        rest = [t for t in tensors if t.name not in present_names]
        shrinks = len(rest) < len(tensors)
        name = _free_name(layout, plan.layout, {head_shard}) if shrinks or shard == SINGLE else shard
        if rest:
            plan.layout[name] = rest
        if rest and shrinks:
            plan.shards[name] = rest
        elif rest and name != shard:
            plan.links[name] = shard
        if name != shard and shard != head_shard:
            plan.to_remove.append(shard)
    plan.shards[head_shard] = plan.layout[head_shard] = list(wanted.values())
    return plan


def _free_name(*taken: Iterable[str]) -> str:
    """Return a name for a shard that is not taken."""
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
        if head is not None and (plan.replaces_head or draft_problem(checkpoint) is not None):
            try:
                quantization = with_head_entries(quantization, head, checkpoint.tensors)
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: nothing was changed: {error}") from error
        config = config.with_quantization(quantization)
        by_auto_round = quantization.method == "auto-round"  # auto-round writes both files
        if (folder / QUANTIZATION).exists() or (plan.replaces_head and by_auto_round):
            _plan_document(plan, folder, QUANTIZATION, quantization)
    _plan_document(plan, folder, "config.json", config)
    return replace(checkpoint, config=config)


def _plan_document(plan: RepairPlan, folder: Path, name: str, document: JsonObject) -> None:
    if not (folder / name).exists() or parse_json(folder / name) != (document, []):
        plan.documents[name] = document


def _auxiliary_files(folder: Path) -> list[str]:
    files = [path.name for path in folder.iterdir() if path.is_file() and path.suffix in AUXILIARY_SUFFIXES]
    return sorted(name for name in files if name not in NOT_AUXILIARY and not name.startswith("."))


def write_repair(
    plan: RepairPlan, folder: Path, stage: Path, place: Callable[[Path, str, list[Tensor]], None] = place_shard
) -> None:
    """Write the files that a repair of `folder` needs to `stage`, each shard with `place`."""
    for shard, tensors in plan.shards.items():
        place(stage, shard, tensors)
    for name, old in plan.links.items():
        (stage / name).hardlink_to((folder / old).resolve())
    for name, document in plan.documents.items():
        write_json(stage, name, document)
    for name, path in plan.copies.items():
        write_file(stage, name, [path.read_bytes()])
