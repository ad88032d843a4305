"""evaluate: run the lm-eval tasks that the recipe names, for the base and for the quantized model, and compare them.

Both are run by vLLM with the benchmark's flags where there is one, else in torch with all weights in memory. The store
keeps the outcomes of a checkpoint: a base is evaluated once for all models made from it. The result is run only until
the comparison is decided, unless the recipe says otherwise. Needs `requant[eval]`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.tasks.artifact import Manifest, digest_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.served_dtype import Dtype, dtype_of_flags, rounded_scales
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.documents import read_stored
from requant.tasks.errors import EngineFailed
from requant.tasks.evaluating.definitions import data_sets, definitions_digest
from requant.tasks.evaluating.harness import Harness, has_client, run_in_torch, run_in_vllm
from requant.tasks.evaluating.outcomes import Outcomes, compare_items
from requant.tasks.evaluating.rounds import run_in_rounds
from requant.tasks.pipeline.stage import Made, Stage, put_files, run_stage
from requant.tasks.recipe.recipe import Eval, Recipe
from requant.tasks.serving.vllm import find_vllm
from requant.tasks.store import Store
from requant.tasks.validating.measured import Evaluation, TaskScore

if TYPE_CHECKING:
    from requant.tasks.validating.model import RunSettings

STAGE = Stage("evaluate", 3, tools=("lm_eval", "transformers"))
RESULT_FILE = "outcomes.json"
log = logging.getLogger(__name__)

Settings = Mapping[str, Any]  # of a key
# Returns the outcomes of the checkpoint in a folder for some settings: from a store, or by doing the work.
Remember = Callable[[Path, Settings, Callable[[], Outcomes]], Outcomes]
Serve = Callable[[Path], contextlib.AbstractContextManager[Harness]]


def evaluation_key(recipe: Recipe) -> dict[str, Any]:
    """Return what a stage key says of the tasks: settings, definitions, engine. Empty if there are no tasks."""
    settings = recipe.eval
    if settings is None:
        return {}
    shown = {**_score_settings(settings), "margin": settings.margin, "stop_early": settings.stop_early}
    engine = {"engine": _engine_settings(recipe)} if _may_use_engine(recipe) else {}
    return {"eval": {**shown, **engine}, "lm_eval": STAGE.locked["lm_eval"], "evaluate": STAGE.version}


def do_not_remember(folder: Path, settings: Settings, work: Callable[[], Outcomes]) -> Outcomes:
    return work()


def remember_in(store: Store, manifests: Mapping[Path, Manifest], settings: Eval) -> Remember:
    """Keep outcomes in a store. `manifests` are those of the folders of checkpoints.

    A key names the checkpoint, the settings, and the current commits of the data sets.
    """

    def remember(folder: Path, run: Settings, work: Callable[[], Outcomes]) -> Outcomes:
        data = data_sets(settings)
        key = STAGE.key(
            reads={"checkpoint": manifests[folder].digest, "data": digest_of(data)},
            settings={**_score_settings(settings), **run},
        )

        def make(scratch: Path) -> Made:
            outcomes = work()
            files = [write_file(scratch, RESULT_FILE, [outcomes.model_dump_json().encode()])]  # a line, not one an item
            put_files(store, scratch, files)
            scores = {name: score.to_json() for name, score in outcomes.scores.items()}
            return Made(Manifest.of(files), {"engine": outcomes.engine, "scores": scores, "data": data})

        manifest = run_stage(store, STAGE, key, make).manifest
        return read_stored(Outcomes, store.read_blob(manifest[RESULT_FILE]), RESULT_FILE)

    return remember


def evaluate_pair(recipe: Recipe, base: Path, ours: Path, logs: Path, remember: Remember) -> Evaluation:
    """Run the tasks of a recipe with the base and with the checkpoint made from it, one after the other, and compare.

    The logs of an engine go to the folder `logs`. Raises EvaluationFailed, HubUnavailable, CheckpointError, or
    RecipeError if REQUANT_VLLM is no command.
    """
    asked = recipe.eval
    assert asked is not None
    if _may_use_engine(recipe) and _has_engine():

        @contextlib.contextmanager
        def serve(folder: Path) -> Iterator[Harness]:
            log_path = logs / f"vllm-eval-{'base' if folder == base else 'result'}.log"
            remote_code = recipe.allow_remote_code
            with run_in_vllm(folder, asked, recipe.benchmark, log_path, remote_code=remote_code) as harness:
                yield harness

        try:
            return _Pair(asked, base, ours, serve, remember).evaluate({"engine": _engine_settings(recipe)})
        except EngineFailed as error:
            log.warning(f"the tasks are run in torch, since vLLM cannot run them: {error}")
    settings = whole_model_settings(base, recipe.allow_remote_code, dtype_of_flags(recipe.benchmark.flags))
    only_ours = scale_settings(ours, settings)
    in_torch = _Pair(asked, base, ours, lambda folder: run_in_torch(folder, asked, settings), remember, only_ours)
    return in_torch.evaluate({"device": settings.device.type, "dtype": str(settings.dtype)})


@dataclass(frozen=True)
class _Pair:
    """A base, a checkpoint made from it, and what runs tasks with either of them.

    `only_ours`: settings on which the outcomes of the checkpoint depend, and those of the base do not.
    """

    asked: Eval
    base: Path
    ours: Path
    serve: Serve
    remember: Remember
    only_ours: Settings = field(default_factory=dict)

    def evaluate(self, settings: Settings) -> Evaluation:
        """Run the tasks with the base, or take what the store has, then with the checkpoint.

        The engine says its version only when it serves. If the store has outcomes of another version for the base, the
        base is run again: differences between versions are not differences between checkpoints.
        """
        for _ in range(2):
            of_base = self.remember(self.base, settings, self._run_base)
            with self.serve(self.ours) as harness:
                if harness.engine == of_base.engine:
                    return compare_outcomes(of_base, self._outcomes(harness, of_base, settings), self.asked)
            settings = {**settings, "version": harness.engine}
        raise EngineFailed(f"the base was run by {of_base.engine}, and the result by {harness.engine}: run again")

    def _run_base(self) -> Outcomes:
        with self.serve(self.base) as harness:
            log.info(f"evaluating the base in {harness.engine} on {', '.join(self.asked.tasks)}")
            return harness.outcomes()

    def _outcomes(self, harness: Harness, of_base: Outcomes, settings: Settings) -> Outcomes:
        """Run the tasks with the checkpoint, or take what the store has."""
        log.info(f"evaluating the result in {harness.engine} on {', '.join(self.asked.tasks)}")
        settings = {**settings, **self.only_ours, "run_by": harness.engine}
        if not stops_early(self.asked, of_base):
            return self.remember(self.ours, settings, harness.outcomes)
        return self.remember(
            self.ours,
            {**settings, "until_decided": {"margin": self.asked.margin, "base": digest_of(of_base.to_json())}},
            lambda: run_in_rounds(of_base, self.asked.margin, harness.engine, harness.answers),
        )


def stops_early(asked: Eval, of_base: Outcomes) -> bool:
    """Check whether the result is run in rounds: if the recipe lets it, and all of the base's scores have items."""
    return asked.stop_early and of_base.scores.keys() == of_base.items.keys()


def compare_outcomes(of_base: Outcomes, of_ours: Outcomes, asked: Eval) -> Evaluation:
    """Compare the outcomes of both models, task by task, on the items that both did.

    The recovery of a task is our score divided by the base's, or the reverse where less is better. It is None if the
    base scores 0: such a task shows nothing, and the worst recovery is None, too.
    """
    early_stop = stops_early(asked, of_base)
    tasks = {}
    for name, base_score in of_base.scores.items():
        our_score, base_items, our_items = of_ours.scores[name], of_base.items.get(name), of_ours.items.get(name)
        more = {}
        if base_items is not None and our_items is not None:
            if len(our_items.ids) < len(base_items.ids):
                base_score = base_items.only(our_items.ids).scored_as(base_score)
            found = compare_items(
                base_items,
                our_items,
                asked.margin,
                higher_is_better=base_score.higher_is_better,
                early_stop=early_stop,
            )
            more = {"paired": found} if found else {}
        above, below = (our_score, base_score) if base_score.higher_is_better else (base_score, our_score)
        tasks[name] = TaskScore(
            metric=base_score.metric,
            base=base_score.value,
            ours=our_score.value,
            recovery=above.value / below.value if base_score.value > 0 and below.value > 0 else None,
            base_stderr=base_score.stderr,
            stderr=our_score.stderr,
            samples=our_score.samples,
            **more,
        )
    recoveries = [task.recovery for task in tasks.values()]
    known = [value for value in recoveries if value is not None]
    return Evaluation(
        tasks=tasks,
        tasks_engine=of_ours.engine,
        worst_task_recovery=min(known) if known and len(known) == len(recoveries) else None,
    )


def whole_model_settings(base: Path, remote_code: bool, served: Dtype | None = None) -> RunSettings:
    """Choose where and in which precision a base and all models made from it are evaluated, with all weights loaded.

    `served`: the dtype that the recipe's flags ask the engine for.
    """
    from requant.tasks.validating.model import RunSettings, pick_device, pick_dtype

    parameters = sum(math.prod(tensor.shape) for tensor in Checkpoint.open(base).tensors.values())
    device = pick_device(parameters)
    return RunSettings(device, pick_dtype(parameters, device), remote_code, served)


def scale_settings(folder: Path, settings: RunSettings) -> Settings:
    """Return what a key says of a checkpoint's scales: the dtype to which they are rounded in torch, if they are."""
    checkpoint = Checkpoint.open(folder)
    rounded = rounded_scales(checkpoint.tensors.values(), settings.served_dtype(checkpoint.config))
    return {"scales": rounded} if rounded else {}


def _may_use_engine(recipe: Recipe) -> bool:
    """Check whether the recipe lets vLLM run its tasks. A server that runs already does not serve the base."""
    return recipe.eval is not None and recipe.eval.engine == "auto" and recipe.benchmark.engine in {"auto", "vllm"}


def _has_engine() -> bool:
    if find_vllm() is None:
        return False
    if not has_client():
        log.warning("the tasks are run in torch, since lm-eval cannot ask vLLM: pip install 'requant[eval]'")
    return has_client()


def _engine_settings(recipe: Recipe) -> dict[str, Any]:
    return {"name": "vllm", "flags": recipe.benchmark.flags, "draft_tokens": recipe.benchmark.draft_tokens}


def _score_settings(settings: Eval) -> dict[str, Any]:
    """Return the settings that shape the scores. The batch size does so only by float noise."""
    asked = settings.model_dump(include={"tasks", "limit", "num_fewshot", "chat_template"})
    return {**asked, "definitions": definitions_digest(settings.definitions)}
