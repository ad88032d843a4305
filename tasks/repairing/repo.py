"""Repairs the MTP head of a repo on the Hub, by a pull request.

A sparse checkout of the repo is repaired as a folder is (`checkpoint.repair`), and inspected before and after. Unless a
pull request is wanted, new shards have headers only: that is all that verdicts need, and nothing is sent.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from requant.tasks.artifact import file_of
from requant.tasks.checkpoint.atomic_swap import install, staged
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import HeadPrecision
from requant.tasks.checkpoint.document import Diagnosis, MtpFixDocument
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.checkpoint.repair import checked_plan, write_repair
from requant.tasks.checkpoint.repair_base import check_fits
from requant.tasks.checkpoint.repair_plan import RepairPlan, RepairSource
from requant.tasks.checkpoint.untrusted import without_folder
from requant.tasks.checkpoint.writer import place_header, place_shard
from requant.tasks.errors import CheckpointError, HubError, HubUnavailable, RecipeError, RequantError
from requant.tasks.hub.revision import Revision, resolve_name, split_name
from requant.tasks.repairing.description import TITLE, describe, improvements
from requant.tasks.repairing.named_base import named_base
from requant.tasks.repairing.proposal import Change, check_account, check_is_main, propose
from requant.tasks.repairing.source import sparse_source

log = logging.getLogger(__name__)


def repair_repo(
    name: str, *, base: str | Path | None = None, precision: HeadPrecision = "keep", pull_request: bool = False
) -> MtpFixDocument:
    """Work out a repair of the repo `repo_id[@revision]`, and open a pull request with it if `pull_request`.

    `base` and `precision` are as for `repair`; by default, the base is the one that the repo's card names, at its
    newest commit, and none if that does not exist, may not be read or does not fit. Data of tensors is downloaded only
    to compare heads that differ in nothing else, and for a pull request.

    Raises CheckpointError as `repair` does, RecipeError for a pull request without a token, HubError, HubUnavailable.
    """
    account = check_account(split_name(name)[0]) if pull_request else None
    revision = resolve_name(name)
    found = _find_base(base) if base else _base_of_card(revision)
    if account is not None:
        check_is_main(revision)
        _check_base(found, revision)
    with sparse_source(revision) as target, _opened(found) as source:
        if base is None and source is not None and not _fits(target, source):
            source = None
        before = _diagnose(target)
        plan, _ = checked_plan(Checkpoint.open(target.folder), source, precision, target.fetch_own)
        after = _carry_out(plan, target, source, with_data=pull_request) if plan.to_write else before
        if plan.to_write and not plan.to_restore and not improvements(before, after):
            log.info(f"{revision.name} stays as it is: no verdict would get better, and no problem would go away")
            plan, after = RepairPlan(plan.present, plan.present), before
        document = MtpFixDocument(
            changed=False,
            tensors_restored=len(plan.to_restore),
            source="base" if source else "dequantized",
            writes=plan.to_write,
            removes=[path for path in plan.to_remove if path not in plan.to_write],
            engines=after.engines,
            problems=after.problems,
            repo=revision.repo_id,
            sha=revision.sha,
            base=(source.name or str(source.folder)) if source else None,
            before=before,
            after=after,
            sizes=plan.sizes,
            upload_bytes=sum(plan.sizes.values()),
            download_bytes=sum(tensor.nbytes for tensor in plan.reads),
        )
        if account is None or not plan.to_write:
            return document
        change = Change(
            target.folder,
            [file_of(target.folder, path) for path in plan.to_write if path not in plan.links],
            plan.links,
            document.removes,
        )
        proposal = propose(revision, change, TITLE, describe(document, precision), account)
        return document.model_copy(update={"changed": proposal.opened, "pull_request": proposal.url})


def _find_base(name: str | Path) -> Path | Revision:
    return Path(name) if Path(name).is_dir() else resolve_name(str(name))


def _base_of_card(revision: Revision) -> Revision | None:
    """Return the base on the Hub that a repo's card names; None if it names none that can be read."""
    try:
        name = named_base(revision)
        return resolve_name(name) if name else None
    except HubUnavailable:
        raise
    except RequantError as error:
        log.warning(f"the base that the card of {revision.repo_id} names is left out: {error}")
        return None


def _fits(target: RepairSource, base: RepairSource) -> bool:
    """Check whether a base that a card names is the target's: what else is wrong can be repaired without it."""
    checkpoint = Checkpoint.open(target.folder)
    try:
        check_fits(checkpoint, Checkpoint.open(base.folder).sound())
    except CheckpointError as error:
        reason = without_folder(without_folder(str(error), base.folder, base.name), target.folder, target.name)
        log.warning(f"the base that the card of {target.name} names is left out: {reason}")
        return False
    return True


@contextlib.contextmanager
def _opened(base: Path | Revision | None) -> Iterator[RepairSource | None]:
    """Yield a base as a source; the sparse checkout of a repo lasts for the block."""
    if isinstance(base, Revision):
        with sparse_source(base) as source:
            yield source
    else:
        yield RepairSource(base) if base else None


def _check_base(base: Path | Revision | None, revision: Revision) -> None:
    """Check that others can look at the base of a pull request. Raises RecipeError for a folder, otherwise HubError."""
    if isinstance(base, Path):
        raise RecipeError(
            f"a pull request names its base, so that others can check it, and {base} is a folder: name the base as "
            "repo_id[@revision]"
        )
    if isinstance(base, Revision) and base.private and not revision.private:
        raise HubError(
            f"{base.repo_id} is private and {revision.repo_id} is not: a pull request would publish its head, so make "
            "the repo private, or name a public base with --base",
            repo_id=base.repo_id,
        )


def _diagnose(source: RepairSource) -> Diagnosis:
    """Inspect a checkpoint. One that cannot be opened has one problem, and no verdicts."""
    try:
        document = inspect_checkpoint(source.folder)
    except CheckpointError as error:
        return Diagnosis(engines={}, problems=[without_folder(str(error), source.folder, source.name)])
    return Diagnosis(engines=document.engines, problems=document.problems)


def _carry_out(plan: RepairPlan, target: RepairSource, source: RepairSource | None, *, with_data: bool) -> Diagnosis:
    """Repair a sparse checkout, and inspect it. Without data, new shards have only the right headers and sizes."""
    if with_data:
        log.info(f"fetching {sum(tensor.nbytes for tensor in plan.reads):,} bytes of tensors")
        for place in (target, source):
            if place is not None:
                place.fetch_own(plan.reads)
    with staged(target.folder) as stage:
        write_repair(plan, target.folder, stage, place_shard if with_data else place_header)
        install(stage, target.folder, plan.to_remove)
    return _diagnose(target)
