"""Repairs the MTP head, the index and the configs of an existing checkpoint in place.

The plan (`repair_plan`) is judged before the folder changes: see `objection`. Then the files that differ are
written, and replace the old ones in one step if the file system allows it (see `atomic_swap`). If no file differs,
nothing is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from requant.tasks.checkpoint.atomic_swap import finish_interrupted, install, locked, remove_stages, staged
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.config import HeadPrecision
from requant.tasks.checkpoint.document import EngineVerdict, MtpFixDocument
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.heads.layouts import promised_layers
from requant.tasks.checkpoint.problems import problems_of
from requant.tasks.checkpoint.repair_plan import RepairPlan, objection, plan_repair
from requant.tasks.checkpoint.repair_plan import RepairSource as RepairSource
from requant.tasks.checkpoint.writer import place_shard, write_file, write_json
from requant.tasks.errors import CheckpointError


def repair(
    folder: Path, base: RepairSource | None, *, precision: HeadPrecision = "keep", dry_run: bool = False
) -> MtpFixDocument:
    """Give a checkpoint the MTP head of its base, and index, configs and auxiliary files that fit.

    `precision`: `keep` (bit for bit), int8 or int4. Without a base, a quantized head is dequantized if neither vLLM nor
    SGLang drafts with it; the precision that its quantization lost stays lost.

    Raises CheckpointError if a base is needed, if base and checkpoint do not fit each other, for an unknown
    quantization method, if no engine would draft with the head, and if an engine would make less of the checkpoint than
    before. Then nothing is changed.
    """
    folder = folder.resolve()
    with locked(folder):
        if not dry_run:
            finish_interrupted(folder)
        plan, after = checked_plan(Checkpoint.open(folder), base, precision)
        if not dry_run:
            remove_stages(folder)
        if plan.to_write and not dry_run:
            if base is not None:
                base.fetch_own(plan.reads)
            with staged(folder) as stage:
                write_repair(plan, folder, stage)
                install(stage, folder, plan.to_remove)
    engines, problems = _promised(plan, after) if dry_run else _made(folder)
    return MtpFixDocument(
        changed=bool(plan.to_write) and not dry_run,
        tensors_restored=len(plan.to_restore),
        source="base" if base else "dequantized",
        writes=plan.to_write,
        removes=[name for name in plan.to_remove if name not in plan.to_write],
        engines=engines,
        problems=problems,
    )


def checked_plan(
    checkpoint: Checkpoint,
    base: RepairSource | None,
    precision: HeadPrecision,
    fetch: Callable[[Iterable[Tensor]], None] = lambda tensors: None,
) -> tuple[RepairPlan, Judgement]:
    """Plan a repair (see `plan_repair`) and judge its target.

    Raises CheckpointError if it must not be carried out, or if all that it would change is a head that needs a base.
    """
    plan = plan_repair(checkpoint, base, precision, fetch)
    after = Judgement.of(plan.target)
    refused = objection(plan, Judgement.of(checkpoint), after, asked=precision != "keep") if plan.to_write else None
    if refused is not None:
        raise CheckpointError(f"{checkpoint.folder}: {refused}")
    needs_head = plan.present.head is not None or promised_layers(checkpoint.config) > 0
    if plan.left is not None and not plan.to_write and needs_head and not after.drafts:
        raise plan.left
    return plan, after


def _made(folder: Path) -> tuple[dict[str, EngineVerdict], list[str]]:
    """Return verdicts on a folder, and its problems."""
    checkpoint = Checkpoint.open(folder)
    judgement = Judgement.of(checkpoint)
    return judgement.verdicts, problems_of(checkpoint, judgement)


def _promised(plan: RepairPlan, judgement: Judgement) -> tuple[dict[str, EngineVerdict], list[str]]:
    """Return verdicts on the target of a plan, and its problems."""
    if not plan.to_write:
        return _made(plan.present.folder)
    return judgement.verdicts, problems_of(plan.target, judgement)


def write_repair(
    plan: RepairPlan, folder: Path, stage: Path, place: Callable[[Path, str, list[Tensor]], None] = place_shard
) -> None:
    """Write the files that a repair of `folder` needs to `stage`, each shard with `place`."""
    for shard, tensors in plan.shards.items():
        place(stage, shard, tensors)
    for name, old in plan.links.items():
        _link(stage / name, folder / old)
    for name, document in plan.documents.items():
        write_json(stage, name, document)
    for name, path in plan.copies.items():
        write_file(stage, name, [path.read_bytes()])


def _link(new: Path, old: Path) -> None:
    """Give a shard a second name: a hard link, otherwise a symbolic link to where `old` leads, otherwise a copy.

    A link of a cache may lead to another file system or to another user's file, which may have no hard link.
    """
    try:
        new.hardlink_to(old.resolve())
    except OSError:
        if old.is_symlink():
            new.symlink_to(old.resolve())
        else:
            shutil.copyfile(old, new)
