"""plan: everything that can be known of a run before weights move, from headers, configs and the store.

`plan` is what `requant plan` prints; `preflight` is the same at the beginning of a run, which it stops. A plan fetches
no weight and changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from requant.tasks import benchmark, evaluate, quantize, validate
from requant.tasks.artifact import REWRITTEN, Manifest
from requant.tasks.checkpoint.base_check import check_base
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.download import download_key, text_files
from requant.tasks.errors import CheckpointError, HubError, HubUnavailable, Refused
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.mtp_fix import mtp_fix_key
from requant.tasks.pipeline.stage import Stage, tool_problems
from requant.tasks.planning.base_headers import BaseHeaders
from requant.tasks.planning.checks import refusals
from requant.tasks.planning.document import (
    OutputLayout,
    OutputTotals,
    Plan,
    PlanDocument,
    PlannedBase,
    Transfers,
    UnknownNeeds,
)
from requant.tasks.planning.groups import settled
from requant.tasks.planning.inputs import Inputs
from requant.tasks.planning.output import plan_output
from requant.tasks.planning.outputs import Before, together
from requant.tasks.planning.resources import disk_problem, needs
from requant.tasks.planning.stages import plan_stages, total_hardware
from requant.tasks.planning.texts import Texts
from requant.tasks.planning.transfers import base_manifest
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from requant.tasks.texts.text import Text, find_text


def plan(store: Store, recipe: Recipe, *, elsewhere: bool = False) -> PlanDocument:
    """Plan a run of a recipe. `elsewhere`: it will be on another machine, and neither disk nor tools of this one are
    judged.

    Raises HubUnavailable, StoreUnreachable, RecipeError for a text that is not there, or for tasks of eval that this
    machine cannot run.
    """
    if not elsewhere:
        evaluate.check_tasks(recipe.eval)
    try:
        inputs = Inputs(
            base=resolve(recipe.base.repo_id, recipe.base.revision),
            calibration=find_text(recipe.quantize.calibration),
            validation=find_text(recipe.validation.text, "validation.text"),
        )
    except HubUnavailable:
        raise
    except HubError as error:
        return _without_result(recipe, None, [str(error)])
    return plan_of(store, recipe, inputs, elsewhere=elsewhere)


@dataclass(frozen=True)
class Foreseen:
    """What is known of a result before the first byte: its recipe, with a number for a group size of auto, and which
    engines will load it and draft."""

    recipe: Recipe
    engines: Mapping[str, Any]


def preflight(
    store: Store, recipe: Recipe, base: Revision, calibration: Text, text: Text, there: Collection[str] = ()
) -> dict[str, Foreseen]:
    """Find out before the first byte whether a run can end well. Raises Refused with the plan's sentences.

    Returns what is foreseen of each result, by the output's name. `there`: the stages that another worker will do.
    """
    document = plan_of(store, recipe, Inputs(base, calibration, text), fetch_texts=True, there=there)
    if document.problems:
        raise Refused("; ".join(document.problems))
    plans: dict[str, Plan] = {one.name: one for one in document.outputs or ()} or {"": document}
    return {name: _foreseen(one, plans[name]) for name, one in recipe.each.items()}


def _foreseen(recipe: Recipe, plan: Plan) -> Foreseen:
    assert isinstance(plan.output, OutputLayout), "a result that cannot be laid out is a problem"
    engines = {engine: verdict.to_json() for engine, verdict in plan.engines.items()}
    return Foreseen(recipe.with_group_size(plan.output.scheme.group_size), engines)


def plan_of(
    store: Store,
    recipe: Recipe,
    inputs: Inputs,
    *,
    elsewhere: bool = False,
    fetch_texts: bool = False,
    there: Collection[str] = (),
) -> PlanDocument:
    """Plan a run of inputs that are resolved; of several outputs one plan for all.

    `fetch_texts`: texts that are Hub data sets are fetched and read too. `there`: the stages that another worker will
    do, with tools of its own.
    """
    with TemporaryDirectory(prefix="requant-") as temporary:
        folder = Path(temporary) / "base"
        try:
            base = BaseHeaders.fetch(store, inputs.base, folder)
        except CheckpointError as error:
            return _without_result(recipe, inputs.base, [_of_the_base(error, folder)])
        files_of = functools.partial(text_files, store)
        texts = Texts(files_of, inputs, folder, Path(temporary) / "texts", fetch=fetch_texts)
        planner = _Planner(inputs, base, texts, elsewhere, there)
        plans, before, makers = dict[str, PlanDocument](), Before(), dict[str, str]()
        for name, asked in recipe.each.items():
            settled_recipe, document = planner.plan_result(asked, before)
            first = makers.setdefault(settled_recipe.makes, name)
            if first != name:
                document = _with_problem(document, _made_twice(settled_recipe, first))
            before.add(settled_recipe, document)
            plans[name] = document
        return together(recipe, plans) if recipe.outputs else plans[""]


@dataclass(frozen=True)
class _Planner:
    """Plans the results of one run, one after the other."""

    inputs: Inputs
    base: BaseHeaders
    texts: Texts
    elsewhere: bool
    there: Collection[str]

    def plan_result(self, recipe: Recipe, before: Before) -> tuple[Recipe, PlanDocument]:
        """Plan one result. Returns its recipe, with a number for a group size of auto, and the plan."""
        source = self.base.source
        problems = list(refusals(source, recipe))
        try:
            check_base(source, recipe.base.repo_id, with_head=recipe.mtp != "drop")
            recipe = settled(source, recipe)
            output = plan_output(source, recipe, self.base.verbatim_files)
        except CheckpointError as error:
            problems.append(_of_the_base(error, source.folder))
            return recipe, _without_result(recipe, self.inputs.base, problems)
        done = _finished_stages(recipe, self.inputs, self.base)
        stages = tuple(plan_stages(recipe, self.base, output, done, before.stages(recipe)))
        to_run = {stage.name for stage in stages if stage.state == "run"}
        needed = needs(output, recipe, self.base.missing_bytes, to_run, kept=before.kept)
        problems += output.problems
        problems += self._machine_problems(recipe, to_run, needed.disk_bytes)
        # What ends the run in any case needs no text to be read.
        problems += [] if problems else self.texts.problems(recipe, to_run, source.text_config)
        return recipe, PlanDocument(
            base=_planned_base(recipe, self.inputs.base, source),
            stages=stages,
            output=output.layout(recipe),
            needs=needed,
            transfer=Transfers.of(stages),
            engines=output.engines(),
            hardware=total_hardware(recipe, stages),
            changes=self.base.changes,
            notes=(*output.notes, *_notes(recipe), *self.texts.notes),
            problems=tuple(problems),
        )

    def _machine_problems(self, recipe: Recipe, to_run: Collection[str], disk_bytes: int) -> list[str]:
        """Say what this machine lacks, where it is the one that will do the work."""
        if self.elsewhere:
            return []
        store, problems = self.base.store, []
        # With a store that machines share, the one that quantizes may be another than this.
        if store.is_local and (too_little := disk_problem(disk_bytes, store.cache.root)):
            problems.append(too_little)
        return [*problems, *tool_problems(_tools(recipe, {*to_run} - {*self.there}))]


def _finished_stages(recipe: Recipe, inputs: Inputs, base: BaseHeaders) -> dict[str, Manifest]:
    """Find the artifacts of the stages that the store has, followed by the keys that a run computes.

    Fetches small files of the base where only they tell, and never a weight.
    """
    store, done = base.store, dict[str, Manifest]()

    def look(stage: str, key: str) -> Manifest | None:
        found = store.manifest(stage, key)
        if found is not None:
            done[stage] = found
        return found

    files = look("download", download_key(inputs.base))
    if files is None and store.has_any("quantize"):
        files = base_manifest(inputs.base, base.hashes, REWRITTEN)  # the same weights may be of another commit
    quantized = look("quantize", quantize.quantize_key(recipe, files, inputs.calibration)) if files else None
    artifact = look("mtp_fix", mtp_fix_key(recipe, files, quantized)) if files and quantized else None
    if files and artifact:
        look("validate", validate.validate_key(recipe, files, artifact, inputs.validation))
        look("benchmark", benchmark.benchmark_key(recipe, artifact))
    return done


def _tools(recipe: Recipe, to_run: Collection[str]) -> Iterator[tuple[Stage, tuple[str, ...]]]:
    """Yield the stages that have tools, in the order of a run, each with the tools that it will use."""
    if "quantize" in to_run:
        yield quantize.STAGE, quantize.STAGE.tools
    if "validate" in to_run:
        yield validate.STAGE, validate.STAGE.tools
        if recipe.eval is not None:  # Tasks are evaluated inside validate.
            yield evaluate.STAGE, evaluate.STAGE.tools
    if "benchmark" in to_run:
        yield benchmark.STAGE, benchmark.used_tools(recipe.benchmark)


def _without_result(recipe: Recipe, base: Revision | None, problems: Iterable[str]) -> PlanDocument:
    """Make the plan of what cannot be made. `base`: None where it does not resolve."""
    return PlanDocument(
        base=_planned_base(recipe, base, None),
        stages=(),
        output=OutputTotals(bytes=None, quantized_tensors=None, kept_tensors=None),
        needs=UnknownNeeds(disk_bytes=None, ram_bytes=None, vram_bytes=None),
        transfer=Transfers.of(()),
        engines={},
        hardware=total_hardware(recipe, ()),
        changes=None,
        notes=_notes(recipe),
        problems=tuple(problems),
        outputs=() if recipe.outputs else None,
    )


def _planned_base(recipe: Recipe, base: Revision | None, source: Checkpoint | None) -> PlannedBase:
    return PlannedBase(
        repo_id=recipe.base.repo_id,
        revision=recipe.base.revision,
        sha=base.sha if base else None,
        bytes=base.size if base else None,
        tensors=len(source.tensors) if source else None,
    )


def _of_the_base(error: CheckpointError, folder: Path) -> str:
    """Word an error without the folder that the base's headers lie in."""
    return str(error).replace(f"{folder}/", "").replace(str(folder), "the base")


def _with_problem(plan: PlanDocument, problem: str) -> PlanDocument:
    return plan.model_copy(update={"problems": (*plan.problems, problem)})


def _made_twice(recipe: Recipe, other: str) -> str:
    """Say that an output makes what another makes, which the recipe alone does not show: it has no number for auto."""
    return (
        f"quantize.group_size auto comes to {recipe.quantize.asked[1]} for this base, so that it makes the same as "
        f"{other}: take one of them out"
    )


def _notes(recipe: Recipe) -> tuple[str, ...]:
    return ("how long the tasks of eval take is not foretold: validate will take longer",) if recipe.eval else ()
