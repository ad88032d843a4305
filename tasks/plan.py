"""plan: what a run will do, take and cost, from headers, configs and the store alone.

`plan` makes the document that `requant plan` prints. `preflight` makes the same plan at the beginning of a run, and
stops a run that could not end well. A plan fetches no weights and changes nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from requant.tasks.acceptance import STAGE as ACCEPTANCE
from requant.tasks.acceptance import acceptance_key, drafts_in, serves_base
from requant.tasks.artifact import REWRITTEN, Manifest, StageKey
from requant.tasks.benchmark import STAGE as BENCHMARK
from requant.tasks.benchmark import benchmark_key, engine_of, used_tools
from requant.tasks.checkpoint.base_check import check_base, check_kind
from requant.tasks.checkpoint.document import EngineVerdict
from requant.tasks.download import download_key
from requant.tasks.errors import CheckpointError, HubError, HubUnavailable, Refused
from requant.tasks.evaluate import STAGE as EVALUATE
from requant.tasks.excerpt import text_files
from requant.tasks.formatting import format_duration
from requant.tasks.hub.release import find_rolled_back
from requant.tasks.hub.revision import Revision
from requant.tasks.license import license_findings
from requant.tasks.merge import find_merged_base, merge_key
from requant.tasks.mtp_fix import mtp_fix_key
from requant.tasks.pipeline.stage import Stage, tool_problems
from requant.tasks.planning.again import UNEXPLAINED, changes_in_words, has_unexplained, why_again
from requant.tasks.planning.base_headers import BaseHeaders
from requant.tasks.planning.checks import base_problems, inspected, result_problems
from requant.tasks.planning.document import Needs, Plan, PlanDocument, PlannedSource, Transfers
from requant.tasks.planning.findings import Findings
from requant.tasks.planning.groups import resolve_group_size
from requant.tasks.planning.inputs import Inputs
from requant.tasks.planning.machine import Here, as_estimated, machine_findings
from requant.tasks.planning.no_result import (
    not_looked_at,
    notes_of,
    planned_base,
    with_problem,
    with_reason,
    without_base_folder,
    without_result,
)
from requant.tasks.planning.output import CheckpointPlan, plan_output
from requant.tasks.planning.outputs import EarlierOutputs, combine_plans
from requant.tasks.planning.outside import engine_findings, target_findings, task_findings
from requant.tasks.planning.resources import disk_problem, estimate_needs
from requant.tasks.planning.stages import ON_GPU, plan_stages, total_hardware
from requant.tasks.planning.texts import Texts
from requant.tasks.planning.transfers import base_manifest
from requant.tasks.probe import STAGE as PROBE
from requant.tasks.probe import no_engine, probe_key
from requant.tasks.quantize import STAGE as QUANTIZE
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.loader import missing_paths
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.self_calibration import self_calibration_key
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration, find_calibration
from requant.tasks.texts.text import Text
from requant.tasks.texts.validation import find_validation_text
from requant.tasks.validate import STAGE as VALIDATE
from requant.tasks.validate import validate_key
from requant.tasks.validating import window_length
from requant.tasks.versions import ABSENT, installed_version
from requant.tasks.writing.amount import needed_tokens, writes_text

log = logging.getLogger(__name__)
# A plan hashes as much of a base in a folder, in a few seconds. What is larger is left to the run.
MAX_HASHED_BYTES = 4 << 30
WORTH_TELLING_S = 60  # how long a run must take to say so before it begins


def plan(store: Store, recipe: Recipe, *, elsewhere: bool = False) -> PlanDocument:
    """Plan a run of a recipe. With `elsewhere`, nothing of this machine is checked, nor the account of its token.

    Where it then lacks a folder or file that the recipe names, the plan has notes of these alone.

    Raises HubUnavailable, StoreUnreachable, or RecipeError if a text does not exist.
    """
    if elsewhere and (missing := tuple(missing_paths(recipe))):
        return not_looked_at(recipe, missing)
    try:
        inputs = Inputs(
            base=find_merged_base(store, recipe, MAX_HASHED_BYTES),
            calibration=find_calibration(recipe.quantize),
            validation=find_validation_text(recipe.validation.text),
        )
    except HubUnavailable:
        raise
    except (HubError, CheckpointError) as error:
        return without_result(recipe, None, [str(error)])
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
    """Check before anything is downloaded that a run can end well. Raises Refused with all problems of the plan.

    Its warnings are logged. `delegated` names the stages that another worker will do. Return what is foreseen of each
    result, by output name.
    """
    planned = _plan_run(store, recipe, Inputs(base, calibration, text), Scope(starts=True, delegated=delegated))
    for warning in planned.document.warnings:
        log.warning(warning)
    if planned.document.problems:
        raise Refused("; ".join(planned.document.problems))
    if (seconds := planned.document.hardware.seconds) >= WORTH_TELLING_S:
        log.info(f"by the plan, this takes about {format_duration(seconds)}")
    plans: dict[str, Plan] = {one.name: one for one in planned.document.outputs or ()} or {"": planned.document}
    return {name: Foreseen(settled, plans[name].engines) for name, settled in planned.recipes.items()}


def plan_of(
    store: Store, recipe: Recipe, inputs: Inputs, *, elsewhere: bool = False, delegated: Collection[str] = ()
) -> PlanDocument:
    """Plan a run whose inputs are resolved. Several outputs have one plan.

    `delegated` names the stages that another worker will do, with tools of its own.
    """
    return _plan_run(store, recipe, inputs, Scope(elsewhere=elsewhere, delegated=delegated)).document


@dataclass(frozen=True)
class Scope:
    """Where and when the planned run takes place.

    elsewhere: not on this machine, so that nothing of it is looked at; starts: it begins now, so that texts which are
    Hub data sets are fetched and read too, and repos may be created; delegated: the stages that another worker does.
    """

    elsewhere: bool = False
    starts: bool = False
    delegated: Collection[str] = ()


@dataclass(frozen=True)
class _PlannedRun:
    """The plan of a run, and the recipe of each result as the plan settled it, by output name."""

    document: PlanDocument
    recipes: Mapping[str, Recipe]


def _plan_run(store: Store, recipe: Recipe, inputs: Inputs, scope: Scope) -> _PlannedRun:
    """Plan a run, and find everything that would stop it. `requant plan` and `requant run` both do this."""
    with TemporaryDirectory(prefix="requant-") as temporary:
        folder = Path(temporary) / "base"
        try:
            base = BaseHeaders.fetch(store, inputs.base, folder)
        except CheckpointError as error:
            return _PlannedRun(without_result(recipe, inputs.base, [without_base_folder(error, folder)]), {})
        files_of = functools.partial(text_files, store)
        texts = Texts(files_of, inputs, folder, Path(temporary) / "texts", fetch=scope.starts)
        planner = _Planner(recipe, inputs, base, texts, scope, None if scope.elsewhere else Here.look())
        plans, recipes, before = dict[str, PlanDocument](), dict[str, Recipe](), EarlierOutputs()
        for name, asked in recipe.each.items():
            recipes[name], plans[name], output = planner.plan_result(asked, before)
            if output is not None and (same := before.find_same(name, recipes[name], output)):
                plans[name] = with_problem(plans[name], same)
            before.add(recipes[name], plans[name])
        document = combine_plans(recipe, plans) if recipe.outputs else plans[""]
        found = Findings() if scope.elsewhere else _found_outside(recipe, base, document, scope)
        calibration = tuple(map(PlannedSource.of, inputs.calibration.sources))
        target = None if recipe.publish is None or recipe.outputs else recipe.publish.repo_id
        document = document.model_copy(
            update={
                "calibration": calibration,
                "repo_id": target,
                "problems": (*document.problems, *found.problems),
                "warnings": (*document.warnings, *found.warnings),
            }
        )
        return _PlannedRun(document, recipes)


def _found_outside(recipe: Recipe, base: BaseHeaders, document: PlanDocument, scope: Scope) -> Findings:
    """Find what is wrong with the tasks of `eval`, the engine, the license, and the repos to publish to."""
    to_run = {stage.name for stage in document.stages if stage.state == "run"} if document.stages else ON_GPU
    found = task_findings(recipe, to_run, scope.delegated) + engine_findings(recipe, to_run, scope.delegated)
    if recipe.probes is not None and PROBE.name not in scope.delegated and (why := no_engine(recipe.benchmark)):
        fails = recipe.gates.max_probe_loss is not None  # A gate with a limit that is not measured is a failed one.
        found += Findings.of(PROBE.name, [why] if fails else [], [] if fails else [why])
    stopped = document.problems or found.problems  # Then no repo is created just to see whether it may be.
    found += license_findings(recipe, base.revision)
    return found + target_findings(recipe, base.revision, starts=scope.starts and not stopped)


@dataclass(frozen=True)
class _Planner:
    """Plans the results of one run of a recipe, one after another."""

    recipe: Recipe
    inputs: Inputs
    base: BaseHeaders
    texts: Texts
    scope: Scope
    here: Here | None  # None: a run elsewhere

    def plan_result(self, recipe: Recipe, before: EarlierOutputs) -> tuple[Recipe, PlanDocument, CheckpointPlan | None]:
        """Plan one result. Return its recipe as it is run, the plan, and the checkpoint if one can be laid out.

        The recipe has a number for a group size of auto, and where it quantizes as an output before it does, the
        spelling of that one, so that this is done once.
        """
        source, repo_id = self.base.source, recipe.base.name
        try:
            check_kind(source, repo_id)
        except CheckpointError as error:  # What else is wrong, the user need not know.
            return recipe, without_result(recipe, self.inputs.base, [str(error)]), None
        found, harmless = inspected(source, recipe)
        problems = [*found, *base_problems(source, recipe)]
        try:
            check_base(source, repo_id, with_head=recipe.mtp != "drop")
            recipe = before.as_spelled(resolve_group_size(source, recipe))
            output = plan_output(source, recipe, self.base.verbatim_files)
        except CheckpointError as error:
            if not found:  # Otherwise it says the same in other words.
                problems.append(without_base_folder(error, source.folder))
            return recipe, without_result(recipe, self.inputs.base, problems), None
        done, again = self._finished_stages(recipe)
        text_tokens = needed_tokens(self.recipe) if writes_text(self.recipe) else None
        engine = engine_of(recipe.benchmark)
        head = recipe.mtp != "drop" and source.head is not None
        compared = drafts_in(engine, recipe.benchmark, head=head) and serves_base(engine, recipe.benchmark)
        asks = PROBE.name in self.scope.delegated or not no_engine(recipe.benchmark)
        left_out = [*([] if compared else [ACCEPTANCE.name]), *([] if asks else [PROBE.name])]
        estimated = as_estimated(recipe, self.here, self.scope.delegated)
        stages = tuple(
            with_reason(stage, again)
            for stage in plan_stages(estimated, self.base, output, done, before.stages(recipe), text_tokens, left_out)
        )
        to_run: list[str] = [stage.name for stage in stages if stage.state == "run"]
        kept_bytes, merge = before.kept_bytes, self.base.merge
        needed = estimate_needs(output, estimated, self.base.missing_bytes, to_run, kept_bytes=kept_bytes, merge=merge)
        machine = self._machine_findings(recipe, output, to_run, needed)
        problems += output.problems or result_problems(output.judgement)  # the former are why engines refuse it
        problems += machine.problems
        if recipe.publish is not None and "mtp_fix" in done and not self.scope.elsewhere:
            rolled_back = find_rolled_back(recipe.publish, self.inputs.base, done["mtp_fix"])
            problems += [f"publish: {rolled_back}"] if rolled_back else []
        # The texts are read last, and only if nothing else stops the run: reading them may take long.
        problems += [] if problems else self.texts.problems(recipe, set(to_run), window_length(source.text_config))
        document = PlanDocument(
            base=planned_base(recipe, self.inputs.base, source),
            stages=stages,
            output=output.layout(recipe),
            needs=needed,
            transfer=Transfers.of(stages, from_folder=self.inputs.base.is_local),
            engines=output.judgement.verdicts,
            hardware=total_hardware(estimated, stages),
            changes=self.base.changes,
            notes=(*harmless, *output.notes, *notes_of(recipe, self.inputs.base), *self.texts.notes),
            problems=tuple(problems),
            warnings=machine.warnings,
        )
        return recipe, document, output

    def _finished_stages(self, recipe: Recipe) -> tuple[dict[str, Manifest], dict[str, str]]:
        """Return the artifacts that a run would reuse for one result, and why others are made again, both by stage.

        Artifacts are found as in a run: the artifact of each stage is part of the key of the next one. Small files of
        the base may be fetched for it, but no weights.
        """
        store, inputs, done, again = self.base.store, self.inputs, dict[str, Manifest](), dict[str, str]()

        def look(stage: str, key_with: Callable[[Manifest], StageKey], files: Manifest) -> Manifest | None:
            key = key_with(files)
            manifest = store.manifest(stage, key)
            if manifest is not None:
                done[stage] = manifest
            elif why := self._why_again(stage, key, key_with):
                again[stage] = why
            return manifest

        files = None
        if inputs.base.sha:  # Otherwise not all files are hashed yet.
            files = store.manifest("download", download_key(inputs.base))
        if files is not None:
            done["download"] = files
        elif store.has_any("quantize") or store.has_any("self_calibration"):
            # Another commit may have the same weights.
            files = base_manifest(inputs.base, self.base.hashes, REWRITTEN)
        if files is not None and (adapter := inputs.base.adapter) is not None:
            files = look("merge", lambda base: merge_key(base, adapter), files)
        if files is None:
            return done, again
        calibration = inputs.calibration
        if calibration.waits_for_base:
            written = look("self_calibration", lambda base: self_calibration_key(self.recipe, base), files)
            if written is None:  # What the base will write is not known, nor are the keys of the other stages.
                return done, again
            calibration = calibration.with_written(written)
        quantized = look("quantize", lambda base: quantize_key(recipe, base, calibration), files)
        if quantized is None:
            return done, again
        artifact = look("mtp_fix", lambda base: mtp_fix_key(recipe, base, quantized), files)
        if artifact is None:
            return done, again
        text, engine = inputs.validation, engine_of(recipe.benchmark)
        look("validate", lambda base: validate_key(recipe, base, artifact, text), files)
        look("benchmark", lambda base: benchmark_key(recipe, artifact), files)
        look("acceptance", lambda base: acceptance_key(recipe, base, artifact, text, engine), files)
        if recipe.probes is not None:
            look("probe", lambda base: probe_key(recipe, base, artifact), files)
        return done, again

    def _why_again(self, stage: str, key: StageKey, key_with: Callable[[Manifest], StageKey]) -> str | None:
        """Say why a stage will run although the store has an earlier result of it; None if it has none."""
        store, last = self.base.store, self.base.last_download
        if not store.has_any(stage):
            return None
        before, changed = None, ""
        if last is not None and self.base.changes is not None:
            sha, files = last
            before, changed = key_with(files), changes_in_words(sha, self.base.changes, len(self.inputs.base.wanted))
        why = why_again(store, stage, key, before, changed)
        if why is None and (last is not None or store.manifest("download", download_key(self.inputs.base))):
            return UNEXPLAINED if has_unexplained(store, stage) else None
        return why

    def _machine_findings(self, recipe: Recipe, output: CheckpointPlan, to_run: list[str], needed: Needs) -> Findings:
        """Say what this machine lacks, if it is the one that will run the stages."""
        if self.here is None:
            return Findings()
        store, found = self.base.store, Findings()
        # If machines share the store, another one may quantize.
        if store.is_local and (too_little := disk_problem(needed.disk_bytes, store.cache.root)):
            found += Findings((too_little,))
        here = [stage for stage in to_run if stage not in self.scope.delegated]
        found += Findings(tuple(tool_problems(_stages_with_tools(recipe, here))))
        return found + machine_findings(self.here, recipe, output, needed, here)


def _stages_with_tools(recipe: Recipe, to_run: Collection[str]) -> Iterator[tuple[Stage, tuple[str, ...]]]:
    """Yield the stages that depend on tools, in the order of a run, each with the tools that it will use."""
    if "quantize" in to_run:
        yield QUANTIZE, QUANTIZE.tools
    if "validate" in to_run:
        yield VALIDATE, VALIDATE.tools
        # Tasks are evaluated inside validate. That there is no lm-eval at all is told with the tasks.
        if recipe.eval is not None and installed_version("lm_eval") != ABSENT:
            yield EVALUATE, EVALUATE.tools
    if "benchmark" in to_run:
        yield BENCHMARK, used_tools(recipe.benchmark)
