"""Parts of a plan that are the same whether a result can be laid out or not, and the plan of none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.untrusted import without_folder
from requant.tasks.errors import CheckpointError
from requant.tasks.formatting import gigabytes
from requant.tasks.hub.revision import Revision
from requant.tasks.local_base import private_paths
from requant.tasks.planning.document import (
    OutputTotals,
    PlanDocument,
    PlannedBase,
    PlannedStage,
    Transfers,
    UnknownNeeds,
)
from requant.tasks.planning.stages import total_hardware
from requant.tasks.recipe.loader import MissingPath
from requant.tasks.recipe.recipe import Recipe


def without_result(recipe: Recipe, base: Revision | None, problems: Iterable[str]) -> PlanDocument:
    """Return the plan of a run that cannot make anything. `base` is None if its revision does not resolve."""
    return PlanDocument(
        base=planned_base(recipe, base, None),
        stages=(),
        output=OutputTotals(bytes=None, quantized_tensors=None, kept_tensors=None),
        needs=UnknownNeeds(disk_bytes=None, ram_bytes=None, vram_bytes=None),
        transfer=Transfers.of(()),
        engines={},
        hardware=total_hardware(recipe, ()),
        changes=None,
        notes=notes_of(recipe, None),
        problems=tuple(problems),
        outputs=() if recipe.outputs else None,
    )


def not_looked_at(recipe: Recipe, missing: Iterable[MissingPath]) -> PlanDocument:
    """Return the plan of a recipe whose base or texts are on another machine: what it publishes to, and notes."""
    notes = tuple(
        f"not looked at: {one.key}, since the {one.kind} {one.path} is not on this machine; here the recipe's keys "
        "alone are checked"
        for one in missing
    )
    plan = without_result(recipe, None, ())
    target = None if recipe.publish is None or recipe.outputs else recipe.publish.repo_id
    return plan.model_copy(update={"notes": (*plan.notes, *notes), "repo_id": target})


def planned_base(recipe: Recipe, base: Revision | None, source: Checkpoint | None) -> PlannedBase:
    return PlannedBase(
        repo_id=recipe.base.name,
        revision=recipe.base.revision,
        sha=(base.sha or None) if base else None,
        folder=recipe.base.folder,
        adapter=base.adapter.name if base and base.adapter else recipe.adapter.name if recipe.adapter else None,
        bytes=base.size if base else None,
        tensors=len(source.tensors) if source else None,
    )


def without_base_folder(error: CheckpointError, folder: Path) -> str:
    """Return the sentence of an error without the temporary folder that holds the base's headers."""
    return without_folder(str(error), folder, "the base")


def with_problem(plan: PlanDocument, problem: str) -> PlanDocument:
    return plan.model_copy(update={"problems": (*plan.problems, problem)})


def with_reason(stage: PlannedStage, again: Mapping[str, str]) -> PlannedStage:
    """Return a stage with the reason why it runs again, if there is one."""
    why = again.get(stage.name) if stage.state == "run" else None
    return stage if why is None else stage.model_copy(update={"again": why})


def notes_of(recipe: Recipe, base: Revision | None) -> tuple[str, ...]:
    """Say what is worth knowing of a recipe and its base."""
    several = _note_of_targets(recipe)
    unknown = ("how long the tasks of eval take is not foretold: validate will take longer",) if recipe.eval else ()
    return (*unknown, *several, *(() if base is None else _notes_of_folder(base)))


def _note_of_targets(recipe: Recipe) -> tuple[str, ...]:
    """Say that no output is published to the repo that `publish` names, where earlier runs may have published to."""
    targets = {one.publish.repo_id.lower() for one in recipe.each.values() if one.publish is not None}
    if recipe.publish is None or not recipe.outputs or recipe.publish.repo_id.lower() in targets:
        return ()
    return (
        f"no output is published to {recipe.publish.repo_id} itself: to go on with a release there, write its repo_id "
        "into the output that it is of",
    )


def _notes_of_folder(base: Revision) -> Iterator[str]:
    """Say what of a base in a folder is known only to a run, and which of its settings name folders of its author."""
    if not base.is_local or base.folder is None:
        return
    yield from private_paths(base.folder)
    if not base.sha:
        yield (
            f"the {gigabytes(base.size)} of the base's folder are not all hashed yet: the run does that first, and "
            "only then knows which stages the store has done already"
        )
