"""Repairs the MTP head, the index and the configs of an existing checkpoint in place.

The plan (`repair_plan`) is judged before the folder changes: see `_check_engines`. Then the files that differ are
written, and replace the old ones in one step if the file system allows it (see `atomic_swap`). If no file differs,
nothing is changed.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from requant.tasks.checkpoint.atomic_swap import finish_interrupted, install, locked, remove_stages, staged
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import DRAFTING, Judgement
from requant.tasks.checkpoint.config import HeadPrecision
from requant.tasks.checkpoint.document import EngineVerdict, MtpFixDocument
from requant.tasks.checkpoint.problems import problems_of
from requant.tasks.checkpoint.repair_plan import RepairPlan, plan_repair
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
        before = Checkpoint.open(folder)
        plan = plan_repair(before, base, precision)
        after = Judgement.of(plan.target)
        if plan.to_write:
            _check_engines(plan, Judgement.of(before).verdicts, after, precision)
        elif plan.left is not None and not any(verdict.mtp for verdict in after.verdicts.values()):
            raise plan.left
        if not dry_run:
            remove_stages(folder)
        if plan.to_write and not dry_run:
            with staged(folder) as stage:
                _write(plan, folder, stage)
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


def _made(folder: Path) -> tuple[dict[str, EngineVerdict], list[str]]:
    """Return verdicts on a folder, and its problems."""
    checkpoint = Checkpoint.open(folder)
    judgement = Judgement.of(checkpoint)
    return judgement.verdicts, problems_of(checkpoint, judgement)


def _promised(plan: RepairPlan, judgement: Judgement) -> tuple[dict[str, EngineVerdict], list[str]]:
    """Return verdicts on the target of a plan, and its problems."""
    if not plan.to_write:
        return _made(plan.present.folder)
    with tempfile.TemporaryDirectory(prefix="requant-") as temporary:
        for name, document in plan.documents.items():
            write_json(Path(temporary), name, document)
        pending = {**plan.copies, **{name: Path(temporary) / name for name in plan.documents}}
        return judgement.verdicts, problems_of(replace(plan.target, pending_files=pending), judgement)


def _check_engines(
    plan: RepairPlan, before: dict[str, EngineVerdict], after: Judgement, precision: HeadPrecision
) -> None:
    """Check that an engine drafts with a changed head, and that none makes less of the checkpoint than before.

    "Not judged" is neither. If the user asks for a quantized head, one engine that drafts with it is enough. Raises
    CheckpointError if a check fails.
    """
    folder = plan.present.folder
    asked = precision != "keep" and any(verdict.mtp for verdict in after.verdicts.values())
    for engine, verdict in after.verdicts.items():
        now = before[engine]
        loads_less = verdict.rank[0] < now.rank[0]
        if loads_less or (verdict.rank < now.rank and not asked):
            lost = "load it" if loads_less else "draft from it"
            raise CheckpointError(
                f"{folder}: {engine} would no longer {lost} after the repair ({verdict.reason}): nothing was changed; "
                "keep the checkpoint as it is, or name another base"
            )
    refusals = [after.verdicts[engine] for engine in DRAFTING if after.verdicts[engine].mtp is False]
    if plan.changes_head and len(refusals) == len(DRAFTING):
        reason = refusals[0].reason
        raise CheckpointError(
            f"{folder}: no engine would draft with the head after the repair ({reason}): nothing was changed"
        )


def _write(plan: RepairPlan, folder: Path, stage: Path) -> None:
    for shard, tensors in plan.shards.items():
        place_shard(stage, shard, tensors)
    for name, old in plan.links.items():
        (stage / name).hardlink_to((folder / old).resolve())
    for name, document in plan.documents.items():
        write_json(stage, name, document)
    for name, path in plan.copies.items():
        write_file(stage, name, [path.read_bytes()])
