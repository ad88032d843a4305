"""plan: what a run will do, take and cost, from headers, configs and the store alone.

`plan` makes the document that `requant plan` prints. `preflight` makes the same plan at the beginning of a run, and
stops a run that could not end well. A plan fetches no weights and changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from requant.tasks.acceptance import STAGE as ACCEPTANCE
from requant.tasks.acceptance import acceptance_key, drafts_in, serves_base
from requant.tasks.artifact import REWRITTEN, Manifest
from requant.tasks.benchmark import STAGE as BENCHMARK
from requant.tasks.benchmark import benchmark_key, engine_of, used_tools
from requant.tasks.checkpoint.base_check import check_base, check_kind
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.document import EngineVerdict
from requant.tasks.checkpoint.untrusted import without_folder
from requant.tasks.download import download_key, find_base
from requant.tasks.errors import CheckpointError, HubError, HubUnavailable, Refused
from requant.tasks.evaluate import STAGE as EVALUATE
from requant.tasks.evaluating.definitions import check_tasks
from requant.tasks.excerpt import text_files
from requant.tasks.hub.revision import Revision
from requant.tasks.mtp_fix import mtp_fix_key
from requant.tasks.pipeline.stage import Stage, tool_problems
from requant.tasks.planning.base_headers import BaseHeaders
from requant.tasks.planning.checks import base_problems, inspected, result_problems
from requant.tasks.planning.document import (
    OutputLayout,
    OutputTotals,
    Plan,
    PlanDocument,
    PlannedBase,
    PlannedSource,
    Transfers,
    UnknownNeeds,
)
from requant.tasks.planning.groups import resolve_group_size
from requant.tasks.planning.inputs import Inputs
from requant.tasks.planning.output import plan_output
from requant.tasks.planning.outputs import EarlierOutputs, combine_plans
from requant.tasks.planning.resources import disk_problem, estimate_needs
from requant.tasks.planning.stages import plan_stages, total_hardware
from requant.tasks.planning.texts import Texts
from requant.tasks.planning.transfers import base_manifest
from requant.tasks.probe import STAGE as PROBE
from requant.tasks.probe import no_engine, probe_key
from requant.tasks.quantize import STAGE as QUANTIZE
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.self_calibration import self_calibration_key
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration, find_calibration
from requant.tasks.texts.text import Text
from requant.tasks.texts.validation import find_validation_text
from requant.tasks.validate import STAGE as VALIDATE
from requant.tasks.validate import validate_key
from requant.tasks.validating import window_length
from requant.tasks.writing.amount import needed_tokens, writes_text

# A plan hashes as much of a base in a folder, in a few seconds. What is larger is left to the run.
MAX_HASHED_BYTES = 4 << 30


def plan(store: Store, recipe: Recipe, *, elsewhere: bool = False) -> PlanDocument:
    """Plan a run of a recipe. With `elsewhere`, neither the disk nor the tools of this machine are checked.

    Raises HubUnavailable, StoreUnreachable, or RecipeError if a text does not exist or this machine cannot run the
    tasks of `eval`.
    """
    if not elsewhere:
        check_tasks(recipe.eval)
    try:
        inputs = Inputs(
            base=find_base(store, recipe.base, MAX_HASHED_BYTES),
            calibration=find_calibration(recipe.quantize),
            validation=find_validation_text(recipe.validation.text),
        )
    except HubUnavailable:
        raise
    except (HubError, CheckpointError) as error:
        return _without_result(recipe, None, [str(error)])
    return plan_of(store, recipe, inputs, elsewhere=elsewhere)


@dataclass(frozen=True)
class Foreseen:
    """What a plan says about one result: its recipe, with a number for a group size of auto, and how engines load it.

    `engines` has the verdict on each engine, by name.
    """

    recipe: Recipe
    engines: Mapping[str, EngineVerdict]


def preflight(
    store: Store, recipe: Recipe, base: Revision, calibration: Calibration, text: Text, delegated: Collection[str] = ()
) -> dict[str, Foreseen]:
    """Check before anything is downloaded that a run can end well. Raises Refused with the problems of the plan.

    `delegated` names the stages that another worker will do. Return what is foreseen of each result, by output name.
    """
    document = plan_of(store, recipe, Inputs(base, calibration, text), fetch_texts=True, delegated=delegated)
    if document.problems:
        raise Refused("; ".join(document.problems))
    plans: dict[str, Plan] = {one.name: one for one in document.outputs or ()} or {"": document}
    return {name: _foreseen(one, plans[name]) for name, one in recipe.each.items()}


def _foreseen(recipe: Recipe, plan: Plan) -> Foreseen:
    assert isinstance(plan.output, OutputLayout), "a result that cannot be laid out is a problem"
    return Foreseen(recipe.with_group_size(plan.output.scheme.group_size), plan.engines)


def plan_of(
    store: Store,
    recipe: Recipe,
    inputs: Inputs,
    *,
    elsewhere: bool = False,
    fetch_texts: bool = False,
    delegated: Collection[str] = (),
) -> PlanDocument:
    """Plan a run whose inputs are resolved. Several outputs have one plan.

    With `fetch_texts`, texts that are Hub data sets are fetched and read too. `delegated` names the stages that another
    worker will do, with tools of its own.
    """
    with TemporaryDirectory(prefix="requant-") as temporary:
        folder = Path(temporary) / "base"
        try:
            base = BaseHeaders.fetch(store, inputs.base, folder)
        except CheckpointError as error:
            return _without_result(recipe, inputs.base, [_without_folder(error, folder)])
        files_of = functools.partial(text_files, store)
        texts = Texts(files_of, inputs, folder, Path(temporary) / "texts", fetch=fetch_texts)
        planner = _Planner(recipe, inputs, base, texts, elsewhere, delegated)
        plans, before, makers = dict[str, PlanDocument](), EarlierOutputs(), dict[str, str]()
        for name, asked in recipe.each.items():
            resolved, document = planner.plan_result(asked, before)
            first = makers.setdefault(resolved.makes, name)
            if first != name:
                document = _with_problem(document, _duplicate_problem(resolved, first))
            before.add(resolved, document)
            plans[name] = document
        document = combine_plans(recipe, plans) if recipe.outputs else plans[""]
        sources = tuple(map(PlannedSource.of, inputs.calibration.sources))
        return document.model_copy(update={"calibration": sources})


@dataclass(frozen=True)
class _Planner:
    """Plans the results of one run of a recipe, one after another."""

    recipe: Recipe
    inputs: Inputs
    base: BaseHeaders
    texts: Texts
    elsewhere: bool
    delegated: Collection[str]

    def plan_result(self, recipe: Recipe, before: EarlierOutputs) -> tuple[Recipe, PlanDocument]:
        """Plan one result. Return its recipe, with a number for a group size of auto, and the plan."""
        source, repo_id = self.base.source, recipe.base.name
        try:
            check_kind(source, repo_id)
        except CheckpointError as error:  # What else is wrong, the user need not know.
            return recipe, _without_result(recipe, self.inputs.base, [str(error)])
        found, harmless = inspected(source, recipe)
        problems = [*found, *base_problems(source, recipe)]
        try:
            check_base(source, repo_id, with_head=recipe.mtp != "drop")
            recipe = resolve_group_size(source, recipe)
            output = plan_output(source, recipe, self.base.verbatim_files)
        except CheckpointError as error:
            if not found:  # Otherwise it says the same in other words.
                problems.append(_without_folder(error, source.folder))
            return recipe, _without_result(recipe, self.inputs.base, problems)
        done = self._finished_stages(recipe)
        text_tokens = needed_tokens(self.recipe) if writes_text(self.recipe) else None
        engine = engine_of(recipe.benchmark)
        head = recipe.mtp != "drop" and source.head is not None
        compared = drafts_in(engine, recipe.benchmark, head=head) and serves_base(engine, recipe.benchmark)
        asks = PROBE.name in self.delegated or not no_engine(recipe.benchmark)
        left_out = [*([] if compared else [ACCEPTANCE.name]), *([] if asks else [PROBE.name])]
        stages = tuple(plan_stages(recipe, self.base, output, done, before.stages(recipe), text_tokens, left_out))
        to_run = {stage.name for stage in stages if stage.state == "run"}
        needed = estimate_needs(output, recipe, self.base.missing_bytes, to_run, kept_bytes=before.kept_bytes)
        problems += output.problems or result_problems(output.judgement)  # the former are why engines refuse it
        problems += self._machine_problems(recipe, to_run, needed.disk_bytes)
        # The texts are read last, and only if nothing else stops the run: reading them may take long.
        problems += [] if problems else self.texts.problems(recipe, to_run, window_length(source.text_config))
        return recipe, PlanDocument(
            base=_planned_base(recipe, self.inputs.base, source),
            stages=stages,
            output=output.layout(recipe),
            needs=needed,
            transfer=Transfers.of(stages),
            engines=output.judgement.verdicts,
            hardware=total_hardware(recipe, stages),
            changes=self.base.changes,
            notes=(*harmless, *output.notes, *_notes(recipe), *self.texts.notes),
            problems=tuple(problems),
        )

    def _finished_stages(self, recipe: Recipe) -> dict[str, Manifest]:
        """Return the artifacts that a run would reuse for one result, by stage.

        They are found as in a run: the artifact of each stage is part of the key of the next one. Small files of the
        base may be fetched for it, but no weights.
        """
        store, inputs, done = self.base.store, self.inputs, dict[str, Manifest]()

        def look(stage: str, key: str) -> Manifest | None:
            manifest = store.manifest(stage, key)
            if manifest is not None:
                done[stage] = manifest
            return manifest

        files = look("download", download_key(inputs.base)) if inputs.base.sha else None  # Else not all is hashed yet.
        if files is None and (store.has_any("quantize") or store.has_any("self_calibration")):
            # Another commit may have the same weights.
            files = base_manifest(inputs.base, self.base.hashes, REWRITTEN)
        if files is None:
            return done
        calibration = inputs.calibration
        if calibration.waits_for_base:
            written = look("self_calibration", self_calibration_key(self.recipe, files))
            if written is None:  # What the base will write is not known, nor are the keys of the other stages.
                return done
            calibration = calibration.with_written(written)
        quantized = look("quantize", quantize_key(recipe, files, calibration))
        artifact = look("mtp_fix", mtp_fix_key(recipe, files, quantized)) if quantized else None
        if artifact:
            look("validate", validate_key(recipe, files, artifact, inputs.validation))
            look("benchmark", benchmark_key(recipe, artifact))
            look("acceptance", acceptance_key(recipe, files, artifact, inputs.validation, engine_of(recipe.benchmark)))
            if recipe.probes is not None:
                look("probe", probe_key(recipe, files, artifact))
        return done

    def _machine_problems(self, recipe: Recipe, to_run: Collection[str], disk_bytes: int) -> list[str]:
        """Say what this machine lacks, if it is the one that will run the stages."""
        if self.elsewhere:
            return []
        store, problems = self.base.store, []
        # If machines share the store, another one may quantize.
        if store.is_local and (too_little := disk_problem(disk_bytes, store.cache.root)):
            problems.append(too_little)
        return [*problems, *tool_problems(_stages_with_tools(recipe, {*to_run} - {*self.delegated}))]


def _stages_with_tools(recipe: Recipe, to_run: Collection[str]) -> Iterator[tuple[Stage, tuple[str, ...]]]:
    """Yield the stages that depend on tools, in the order of a run, each with the tools that it will use."""
    if "quantize" in to_run:
        yield QUANTIZE, QUANTIZE.tools
    if "validate" in to_run:
        yield VALIDATE, VALIDATE.tools
        if recipe.eval is not None:  # Tasks are evaluated inside validate.
            yield EVALUATE, EVALUATE.tools
    if "benchmark" in to_run:
        yield BENCHMARK, used_tools(recipe.benchmark)


def _without_result(recipe: Recipe, base: Revision | None, problems: Iterable[str]) -> PlanDocument:
    """Return the plan of a run that cannot make anything. `base` is None if its revision does not resolve."""
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
        repo_id=recipe.base.name,
        revision=recipe.base.revision,
        sha=(base.sha or None) if base else None,
        folder=recipe.base.folder,
        bytes=base.size if base else None,
        tensors=len(source.tensors) if source else None,
    )


def _without_folder(error: CheckpointError, folder: Path) -> str:
    """Return the sentence of an error without the temporary folder that holds the base's headers."""
    return without_folder(str(error), folder, "the base")


def _with_problem(plan: PlanDocument, problem: str) -> PlanDocument:
    return plan.model_copy(update={"problems": (*plan.problems, problem)})


def _duplicate_problem(recipe: Recipe, other: str) -> str:
    """Say that two outputs are the same, which only shows when a group size of auto has its number."""
    return (
        f"quantize.group_size auto comes to {recipe.quantize.asked[1]} for this base, so that it makes the same as "
        f"{other}: take one of them out"
    )


def _notes(recipe: Recipe) -> tuple[str, ...]:
    return ("how long the tasks of eval take is not foretold: validate will take longer",) if recipe.eval else ()
