"""Plans the repair of a checkpoint from headers and configs, and from the data of a base's head.

The result is the target checkpoint and the files that differ from the folder's. Nothing is written here, so that
`inspect` can tell from a plan whether a repair would help.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from requant.tasks.checkpoint.checkpoint import (
    INDEX,
    QUANTIZATION,
    QUANTIZATION_FILES,
    SINGLE,
    Ambiguous,
    Checkpoint,
    Mendable,
    OfIndex,
    Unread,
    beside_index,
    parse_json,
    read_json,
)
from requant.tasks.checkpoint.compat import DRAFTING, Judgement
from requant.tasks.checkpoint.config import HeadPrecision, JsonObject, ModelConfig, QuantizationConfig
from requant.tasks.checkpoint.exclusions import with_head_entries, with_modelopt_entries
from requant.tasks.checkpoint.head import HEAD_SHARD, NAME_BASE, Tensors, dequantized_head, head_tensors
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.heads.missing import depths_of, stated_count
from requant.tasks.checkpoint.inventory import missing_parts
from requant.tasks.checkpoint.methods import MODELOPT_FILE, MODELOPT_METHODS
from requant.tasks.checkpoint.mtp import Head, find_head
from requant.tasks.checkpoint.repair_base import alike_tensors, check_fits, differing_tensors, stored_tensors
from requant.tasks.checkpoint.shards import Contents, contents_of
from requant.tasks.checkpoint.writer import Layout, index_of
from requant.tasks.errors import CheckpointError

RESTORED_SHARD = "model-restored-{:05d}.safetensors"
# Files for tokenizer, processor and generation have one of these suffixes, and are none of NOT_AUXILIARY.
AUXILIARY_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken")
NOT_AUXILIARY = {"config.json", INDEX, MODELOPT_FILE, *QUANTIZATION_FILES}

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
        self.fetch([tensor for tensor in tensors if tensor.path.is_relative_to(self.folder)], ())


@dataclass
class RepairPlan:
    """What a repair has to do.

    `present` and `target` are the checkpoint as its files are, and as it will be. `layout` has every shard of the
    target with its tensors, by name. `shards`, `links`, `documents` and `copies` are files to write, by name: from
    tensors, as a link to an existing shard, as JSON, and as a copy of a file of the base. `to_remove` are names of
    files, `to_restore` those of the head's tensors that differ. `head_source`: the stored tensors of the head, of which
    those that are computed are made. `head_shard`: the shard that is written for the head, or "". `changes_head`: the
    head's tensors change, or what a config says of them. `left`: why the head stays as it is, though an engine would
    not draft with it.
    """

    present: Checkpoint
    target: Checkpoint
    layout: Shards = field(default_factory=dict)
    shards: Shards = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    documents: dict[str, JsonObject] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    to_remove: list[str] = field(default_factory=list)
    to_restore: list[str] = field(default_factory=list)
    head_source: list[Tensor] = field(default_factory=list)
    head_shard: str = ""
    changes_head: bool = False
    left: CheckpointError | None = None

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
        return stored_tensors((tensor for shard in self.shards.values() for tensor in shard), self.head_source)


def plan_repair(
    checkpoint: Checkpoint,
    base: RepairSource | None,
    precision: HeadPrecision,
    fetch: Callable[[Iterable[Tensor]], None] = lambda tensors: None,
) -> RepairPlan:
    """Plan what a repair of this checkpoint has to do.

    Of the base, the auxiliary files that the folder lacks are downloaded (`RepairSource.fetch`), and the data of a head
    that may differ in nothing else; `fetch` does that for the checkpoint's own tensors. What the shards are written
    from is not downloaded: see `RepairPlan.reads`. Without a base
    only headers and configs are read, and the head changes only if that helps; otherwise `left` says why not.

    Raises CheckpointError if the checkpoint cannot be read by its headers, or if the base is not the checkpoint's.
    """
    found = as_found(checkpoint, without_head=base is not None)
    if base is None:
        if precision != "keep":
            raise CheckpointError(f"a head with {precision} is made from the base's: {NAME_BASE}")
        plan = _plan_own_head(found)
    else:
        plan = _plan_head_of(base, found, precision, fetch)
    _plan_shards(plan, with_base=base is not None)
    _plan_documents(plan)
    contents = _contents_after(plan)
    plan.target = replace(
        plan.target,
        shards=tuple(plan.layout),
        contents=contents,
        problems=beside_index(contents, plan.target.config) if contents else [],
        pending_documents=plan.documents,
        planned=True,
    )
    return plan


def _contents_after(plan: RepairPlan) -> Contents | None:
    """Return what the weight files of the target will hold, those included that stay beside the index.

    None if there will be no index.
    """
    folder = plan.target.folder
    if INDEX not in plan.documents and not (folder / INDEX).exists():
        return None
    headers = {shard: {tensor.name: tensor for tensor in tensors} for shard, tensors in plan.layout.items()}
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    return contents_of(folder, plan.target.config, weight_map, headers, plan.to_remove)


def as_found(checkpoint: Checkpoint, *, without_head: bool) -> Checkpoint:
    """Return a checkpoint with the tensors that its files have, whatever the index says.

    `without_head`: a missing or broken shard of the head may be left out. Raises CheckpointError if any other tensor
    that the index names is in no file or in several, and for any problem that is not the index's.
    """
    contents = checkpoint.contents
    if contents is None or any(isinstance(p, Ambiguous) and not isinstance(p, OfIndex) for p in checkpoint.problems):
        return checkpoint.sound()
    if not all(isinstance(problem, Mendable | Unread) for problem in checkpoint.fatal):
        return checkpoint.sound()
    head = find_head([*contents.tensors, *contents.lost], checkpoint.config) if without_head else None
    head_names = set(head.names if head else ())
    lost = set(contents.lost) - head_names
    unread = checkpoint.has_unread and not head_names.issuperset(contents.absent)
    if lost or unread or contents.twice or (checkpoint.fatal and not contents.named):
        return checkpoint.sound()
    return replace(checkpoint, tensors=contents.tensors, problems=[])


def _plan_own_head(found: Checkpoint) -> RepairPlan:
    """Plan the head without a base: as it is, described rightly, or dequantized if no engine drafts with it."""
    plan = RepairPlan(found, replace(found, config=_described(found)), head_source=_head_tensors(found))
    head, before = found.head, Judgement.of(plan.target)
    if head is None:
        plan.left = CheckpointError(f"{found.folder} has no MTP head: {NAME_BASE} to restore it")
        return plan
    if before.draft_problem is None:
        return plan
    missing = missing_parts(found, head)
    if missing:
        plan.left = CheckpointError(f"{found.folder}: {missing[0]} is missing from the MTP head: {NAME_BASE}")
        return plan
    best = before
    # A head that an engine drafts with is left quantized: that may be meant so, and what is lost stays lost.
    candidates = (
        (_counted_head, _described_head) if before.drafts else (_counted_head, _described_head, _dequantized_head)
    )
    for candidate in candidates:
        try:
            target = candidate(plan.target, head)
        except CheckpointError as error:
            plan.left = plan.left or CheckpointError(f"{found.folder}: nothing was changed: {error}")
            continue
        after = Judgement.of(target)
        if _is_better(after, best):
            plan.target, plan.changes_head, best = target, True, after
        if after.draft_problem is None:
            break
    plan.to_restore = [name for name, t in plan.target.tensors.items() if found.tensors.get(name) != t]
    if plan.changes_head:
        plan.left = None
    elif plan.left is None:
        plan.left = CheckpointError(f"{found.folder}: nothing was changed: {before.draft_problem}")
    return plan


def objection(plan: RepairPlan, before: Judgement, after: Judgement, *, asked: bool = False) -> str | None:
    """Return why a plan must not be carried out, or None.

    An engine would make less of the checkpoint than before, or none would draft with a changed head. "Not judged" is
    neither yes nor no. `asked`: the user asks for a quantized head, so that one engine that drafts with it is enough.
    """
    verdicts, old, new = after.verdicts, before.ranks, after.ranks
    enough = asked and any(verdict.mtp for verdict in verdicts.values())
    for engine, verdict in verdicts.items():
        loads_less = new[engine][0] < old[engine][0]
        drafts_less = old[engine][0] > 0 and new[engine][1] < old[engine][1]
        if loads_less or (drafts_less and not enough):
            lost = "load it" if loads_less else "draft from it"
            return (
                f"{engine} would no longer {lost} after the repair ({verdict.reason}): nothing was changed; "
                "keep the checkpoint as it is, or name another base"
            )
    if plan.changes_head and not any(new[engine][1] for engine in DRAFTING):
        reason = verdicts[DRAFTING[0]].reason
        return f"no engine would draft with the head after the repair ({reason}): nothing was changed"
    return None


def _counted_head(checkpoint: Checkpoint, head: Head) -> Checkpoint:
    return replace(checkpoint, config=_counted(checkpoint.config, head))


def _described_head(checkpoint: Checkpoint, head: Head) -> Checkpoint:
    return with_head(checkpoint, checkpoint.config, _own_tensors(checkpoint), set(head.names))


def _dequantized_head(checkpoint: Checkpoint, head: Head) -> Checkpoint:
    return with_head(checkpoint, checkpoint.config, dequantized_head(checkpoint), set(head.names))


def _own_tensors(checkpoint: Checkpoint) -> Tensors:
    head = checkpoint.head
    return {name: checkpoint.tensors[name] for name in head.names} if head else {}


def _head_tensors(checkpoint: Checkpoint) -> list[Tensor]:
    return list(_own_tensors(checkpoint).values())


def _is_better(after: Judgement, before: Judgement) -> bool:
    """Check whether no engine makes less of a checkpoint than before, and one makes more of it."""
    pairs = [
        (new, old)
        for engine, ranks in after.ranks.items()
        for new, old in zip(ranks, before.ranks[engine], strict=True)
    ]
    return all(new >= old for new, old in pairs) and any(new > old for new, old in pairs)


def _plan_head_of(
    base: RepairSource, found: Checkpoint, precision: HeadPrecision, fetch: Callable[[Iterable[Tensor]], None]
) -> RepairPlan:
    """Plan the base's head, and the auxiliary files that the folder lacks."""
    source = as_found(Checkpoint.open(base.folder), without_head=False)
    check_fits(found, source)
    wanted = head_tensors(source, precision, found.quantization)
    missing_files = [name for name in _auxiliary_files(base.folder) if not (found.folder / name).is_file()]
    copies = {name: base.folder / name for name in missing_files}
    base.fetch((), copies)
    head_source = _head_tensors(source)
    alike = alike_tensors(found, wanted)
    fetch(alike)
    base.fetch_own(stored_tensors((wanted[tensor.name] for tensor in alike), head_source))
    present = _present_head(found, source)
    differing = differing_tensors(found, wanted)
    replaces = bool(differing or present - set(wanted))
    config = _described(found).with_mtp_layers_of(source.config)
    target = replace(found, config=config, pending_files=copies)
    if replaces or Judgement.of(target).draft_problem is not None:
        try:
            target = with_head(target, config, wanted if replaces else _own_tensors(target), present)
        except CheckpointError as error:
            raise CheckpointError(f"{found.folder}: nothing was changed: {error}") from error
    missing = missing_parts(target, target.head) if target.head else []
    if missing:
        raise CheckpointError(f"{found.folder}: {missing[0]} is missing from the MTP head: name another base")
    changes = replaces or target.quantization != found.quantization
    return RepairPlan(found, target, copies=copies, to_restore=differing, head_source=head_source, changes_head=changes)


def _present_head(checkpoint: Checkpoint, base: Checkpoint) -> set[str]:
    """Return the checkpoint's tensors under the prefixes of its own head or of the base's, by name."""
    heads = (owner.head for owner in (checkpoint, base))
    prefixes = {prefix for head in heads if head for prefix in head.prefixes}
    return {name for name in checkpoint.tensors if any(name.startswith(f"{prefix}.") for prefix in prefixes)}


def _described(checkpoint: Checkpoint) -> ModelConfig:
    """Return the config with the quantization config, if that stands in a file of its own that engines do not read."""
    if checkpoint.quantization_file in (None, MODELOPT_FILE):
        return checkpoint.config
    return checkpoint.config.with_quantization(checkpoint.quantization)


def _counted(config: ModelConfig, head: Head) -> ModelConfig:
    """Return a config that promises as many MTP layers as the head has, under the key that it has for that."""
    if head.known is None:
        return config
    stated, there = stated_count(config, head.known), depths_of(head, config)
    wrong = stated.count is None or stated.count < there or stated.count <= 0
    return config.with_count(stated.key, there) if stated.key and wrong else config


def with_head(checkpoint: Checkpoint, config: ModelConfig, wanted: Tensors, present: set[str]) -> Checkpoint:
    """Return a checkpoint with another head, and with a config that counts its layers and says how they are stored.

    `present`: names of the tensors of the head that is there. Raises CheckpointError if the words of the quantization
    method are not known.
    """
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in present}
    target = replace(checkpoint, tensors={**kept, **wanted}, config=config)
    head = target.head
    if head is None:
        return target
    config = _counted(config, head)
    if not target.quantization:
        return replace(target, config=config)
    stated = with_head_entries(target.quantization, head, target.tensors)
    if target.quantization_file == MODELOPT_FILE:
        return replace(target, config=config, pending_documents={MODELOPT_FILE: stated})
    return replace(target, config=config.with_quantization(stated))


def _plan_shards(plan: RepairPlan, *, with_base: bool) -> None:
    """Plan the shards of the target: those that stay, those that lose tensors, and the head's.

    A shard that loses tensors gets a new name, so that the old index stays valid until it is replaced. Only with a base
    may a shard of HEAD_SHARD's name with nothing but the head be replaced before the index: the next repair restores a
    head that index and shard disagree about, but no other tensor. No other file of the folder is replaced: it may hold
    the only copy of a tensor, or a better one.
    """
    folder, contents = plan.present.folder, plan.present.contents or Contents()
    old = _by_shard(folder, plan.present.tensors.values())
    moved = bool(plan.to_restore) or set(plan.present.tensors) != set(plan.target.tensors)
    head = plan.target.head if moved else None
    head_names = set(head.names if head else ())
    stays = {id(tensor) for name, tensor in plan.target.tensors.items() if name not in head_names}
    lost = {name for name in plan.present.tensors if name not in plan.target.tensors} | head_names
    taken = {*old, *contents.named, *contents.counts, *(stray.name for stray in contents.strays)}
    there = old.get(HEAD_SHARD, [])
    only_head = len(there) == contents.counts.get(HEAD_SHARD, 0) and all(tensor.name in lost for tensor in there)
    replaced = with_base and only_head and HEAD_SHARD in {*old, *contents.named}
    head_shard = HEAD_SHARD if replaced or HEAD_SHARD not in taken else _free_name(taken)
    keeps_single = not head_names and (set(old) == {SINGLE} or SINGLE in contents.named)
    for shard, tensors in old.items():
        rest = [tensor for tensor in tensors if id(tensor) in stays]
        is_whole = len(rest) == contents.counts.get(shard, len(tensors))
        renamed = not is_whole or (shard == SINGLE and not keeps_single)
        name = _free_name(taken, plan.layout, {head_shard}) if renamed else shard
        if rest:
            plan.layout[name] = rest
            if not is_whole:
                plan.shards[name] = rest
            elif renamed:
                plan.links[name] = shard
        has_only_counted = len(tensors) == contents.counts.get(shard, len(tensors))
        if renamed and has_only_counted and shard != head_shard:
            plan.to_remove.append(shard)
    if head_names:
        plan.head_shard = head_shard
        plan.shards[head_shard] = plan.layout[head_shard] = [plan.target.tensors[name] for name in sorted(head_names)]
    if contents.named:
        unnamed = set(plan.present.shards) - set(plan.layout) - set(plan.to_remove)
        plan.to_remove += sorted(shard for shard in unnamed if os.path.lexists(folder / shard))


def _by_shard(folder: Path, tensors: Iterable[Tensor]) -> Shards:
    """Group tensors by their shard, whose name is its path in the folder."""
    layout: Shards = {}
    for tensor in tensors:
        layout.setdefault(tensor.path.relative_to(folder).as_posix(), []).append(tensor)
    return layout


def _free_name(*taken: Iterable[str]) -> str:
    """Return a name for a shard that is not taken."""
    used = {name for names in taken for name in names}
    return next(name for number in itertools.count(1) if (name := RESTORED_SHARD.format(number)) not in used)


def _plan_documents(plan: RepairPlan) -> None:
    """Plan the index and the configs that differ from those of the folder."""
    folder, target = plan.target.folder, plan.target
    if (folder / INDEX).exists() or set(plan.layout) != {SINGLE}:
        old_index = read_json(folder / INDEX) if (folder / INDEX).exists() else None
        index = index_of(plan.layout, old_index)
        if old_index is not None and plan.present.total_size is None and index["weight_map"] == old_index["weight_map"]:
            index = old_index  # without a total_size, which nobody needs
        _plan_document(plan, INDEX, index)
    quantization = target.config.quantization
    by_auto_round = quantization.method == "auto-round"  # auto-round writes both files
    if quantization and ((folder / QUANTIZATION).exists() or (plan.head_shard and by_auto_round)):
        _plan_document(plan, QUANTIZATION, quantization)
    by_modelopt = (folder / MODELOPT_FILE).exists() and (not quantization or quantization.method in MODELOPT_METHODS)
    if plan.changes_head and target.head is not None and by_modelopt:
        stated = QuantizationConfig(read_json(folder / MODELOPT_FILE))
        _plan_document(plan, MODELOPT_FILE, with_modelopt_entries(stated, target.head, target.tensors))
    _plan_document(plan, "config.json", target.config)


def _plan_document(plan: RepairPlan, name: str, document: JsonObject) -> None:
    file = plan.target.folder / name
    if not file.exists() or parse_json(file) != (document, []):
        plan.documents[name] = document


def _auxiliary_files(folder: Path) -> list[str]:
    files = [path.name for path in folder.iterdir() if path.is_file() and path.suffix in AUXILIARY_SUFFIXES]
    return sorted(name for name in files if name not in NOT_AUXILIARY and not name.startswith("."))
