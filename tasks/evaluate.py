"""evaluate: run the lm-eval tasks that the recipe names, for the base and for the quantized model.

One benchmark alone hides damage, so the gate looks at the task that lost the largest share of the base's score. The
store keeps the scores of a checkpoint: a base is evaluated once for all models made from it. Needs `requant[eval]`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, TypeAdapter

from requant.tasks.artifact import Manifest, digest_of, sha256_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.writer import write_json
from requant.tasks.documents import StoredDocument
from requant.tasks.errors import EvaluationFailed, HubUnavailable, RecipeError, RequantError
from requant.tasks.hub.revision import resolve
from requant.tasks.pipeline.stage import Made, Stage, put_files, run_stage
from requant.tasks.recipe.recipe import Eval, Recipe
from requant.tasks.store import Store
from requant.tasks.validating.measured import Evaluation, TaskScore

if TYPE_CHECKING:
    from requant.tasks.validating.model import RunSettings

STAGE = Stage("evaluate", 1, tools=("lm_eval", "transformers"))
RESULT_FILE = "scores.json"
SEED = 1234  # of few-shot examples and bootstrap
BOOTSTRAP_DRAWS = 1000  # for the standard error of metrics that are not a mean
log = logging.getLogger(__name__)
logging.getLogger("lm_eval").setLevel(logging.ERROR)


Definition = Mapping[str, Any]  # of a task, as its YAML has it


class Entry(Protocol):
    """An entry of lm-eval's index: the part that is read here."""

    @property
    def kind(self) -> Enum: ...
    @property
    def cfg(self) -> Definition | None: ...
    @property
    def tags(self) -> Collection[str]: ...


TaskIndex = Mapping[str, Entry]


class Score(StoredDocument):
    """The score of one checkpoint in one task."""

    metric: str = Field(description="lm-eval's name of the metric, with the filter of the answers if there is one")
    value: float = Field(description="The score, in the metric's own unit")
    stderr: float | None = Field(None, description="Its standard error; null if lm-eval gives none")
    samples: int | None = Field(None, description="Number of samples of the task")
    higher_is_better: bool = Field(True, description="False for metrics such as perplexity")


Scores = dict[str, Score]  # by task
SCORES = TypeAdapter(Scores)


def has_lm_eval() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def check_tasks(settings: Eval | None) -> None:
    """Check whether these tasks can be run here, before any work is done. Raises RecipeError if they cannot."""
    if settings is None:
        return
    if not has_lm_eval():
        raise RecipeError(f"eval.tasks: {settings.tasks[0]} needs lm-eval: pip install 'requant[eval]'")
    if settings.definitions is not None and not os.path.isdir(settings.definitions):
        raise RecipeError(f"eval.definitions: the folder {settings.definitions} does not exist: correct the path")
    index = _task_index(settings)
    for name in settings.tasks:
        if name not in index:
            raise RecipeError(f"eval.tasks: lm-eval has no task {name}: `lm_eval ls tasks` lists them")
        for definition in _leaves(index, name):
            if definition.get("unsafe_code"):
                raise RecipeError(
                    f"eval.tasks: {name} runs code that the model writes, and this machine is no sandbox: leave it out"
                )


def evaluation_key(settings: Eval | None) -> dict[str, Any]:
    """Return what a stage key says of the tasks: their settings and definitions. Empty if there are no tasks."""
    if settings is None:
        return {}
    return {"eval": {**_score_settings(settings), "lm_eval": STAGE.locked["lm_eval"]}}


def stored_scores(
    store: Store, recipe: Recipe, checkpoint: Manifest, folder: Path, run_settings: RunSettings
) -> Scores:
    """Return the scores of one checkpoint, from the store if they are there.

    Their key names the checkpoint, the settings of the tasks, and the current commits of the data sets.
    """
    assert recipe.eval is not None
    settings = recipe.eval
    data = data_sets(settings)
    key = STAGE.key(
        reads={"checkpoint": checkpoint.digest, "data": digest_of(data)},
        settings={
            **_score_settings(settings),
            "device": run_settings.device.type,
            "dtype": str(run_settings.dtype),
        },
    )

    def work(scratch: Path) -> Made:
        log.info(f"evaluating {folder.name} on {', '.join(settings.tasks)}")
        scores = SCORES.dump_python(evaluate(folder, settings, run_settings), mode="json")
        files = [write_json(scratch, RESULT_FILE, scores)]
        put_files(store, scratch, files)
        return Made(Manifest.of(files), {"scores": scores, "data": data})

    return SCORES.validate_json(store.read_blob(run_stage(store, STAGE, key, work).manifest[RESULT_FILE]))


def evaluate(folder: Path, settings: Eval, run_settings: RunSettings) -> Scores:
    """Run the tasks with one checkpoint and return the first metric of each.

    A group that lm-eval aggregates counts as one task; other groups, and tags, count as their members. Raises
    EvaluationFailed, or HubUnavailable if a data set cannot be fetched at the moment.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # otherwise lm-eval forks this process for each bootstrap
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from requant.tasks.validating.model import free, load_model, load_tokenizer

    model = load_model(Checkpoint.open(folder).sound(), run_settings)
    tokenizer = load_tokenizer(folder, remote_code=run_settings.remote_code)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints, and stdout may be reserved for a JSON document
            results = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=settings.batch_size),
                tasks=list(settings.tasks),
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                apply_chat_template=settings.chat_template,
                task_manager=_task_manager(settings),
                log_samples=False,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
    except (RequantError, MemoryError):
        raise
    except Exception as error:  # a task, its data set and its metric may raise anything
        if type(error).__name__ == "OutOfMemoryError":
            raise
        first_line = next(iter(str(error).splitlines()), "")
        raised = HubUnavailable if isinstance(error, ConnectionError) else EvaluationFailed
        raise raised(
            f"lm-eval failed on {', '.join(settings.tasks)} ({type(error).__name__}: {first_line[:300]})"
        ) from error
    del model
    free(run_settings.device)
    return _scores(results)


def _scores(results: Mapping[str, Any]) -> Scores:
    """Take the first metric of each entry of lm-eval's results, except members of an aggregated group."""
    scores: Scores = {}
    for name, entry in results["results"].items():
        metrics = [key for key in entry if "," in key and "_stderr," not in key]
        values = [(key, entry[key]) for key in metrics if isinstance(entry[key], int | float)]
        if not values:
            continue
        (key, value), *_ = values
        metric, _, filter_name = key.partition(",")
        stderr = entry.get(f"{metric}_stderr,{filter_name}")
        scores[name] = Score(
            metric=metric if filter_name == "none" else f"{metric}, {filter_name}",
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            samples=entry.get("sample_len"),
            higher_is_better=bool(results["higher_is_better"].get(name, {}).get(metric, True)),
        )
    grouped = {
        member for group, members in results.get("group_subtasks", {}).items() if group in scores for member in members
    }
    return {name: score for name, score in scores.items() if name not in grouped}


def recovery(base: Mapping[str, Score], ours: Mapping[str, Score]) -> Evaluation:
    """Compare the scores of both models, task by task.

    The recovery of a task is our score divided by the base's, or the reverse where less is better. It is None if the
    base scores 0: such a task shows nothing, and the worst recovery is None, too.
    """
    tasks = {}
    for name, base_score in base.items():
        our_score = ours[name]
        above, below = (our_score, base_score) if base_score.higher_is_better else (base_score, our_score)
        tasks[name] = TaskScore(
            metric=base_score.metric,
            base=base_score.value,
            ours=our_score.value,
            recovery=above.value / below.value if base_score.value > 0 and below.value > 0 else None,
            base_stderr=base_score.stderr,
            stderr=our_score.stderr,
            samples=base_score.samples,
        )
    recoveries = [task.recovery for task in tasks.values()]
    known = [value for value in recoveries if value is not None]
    return Evaluation(tasks=tasks, worst_task_recovery=min(known) if known and len(known) == len(recoveries) else None)


def whole_model_settings(base: Path, remote_code: bool) -> RunSettings:
    """Choose where and in which precision a base and all models made from it are evaluated, with all weights loaded."""
    from requant.tasks.validating.model import RunSettings, pick_device, pick_dtype

    parameters = sum(math.prod(tensor.shape) for tensor in Checkpoint.open(base).tensors.values())
    device = pick_device(parameters)
    return RunSettings(device, pick_dtype(parameters, device), remote_code)


def data_sets(settings: Eval) -> dict[str, str]:
    """Return the Hub data sets that the tasks name, with their current commits."""
    index = _task_index(settings)
    paths = {str(leaf.get("dataset_path")) for name in settings.tasks for leaf in _leaves(index, name)}
    return {path: resolve(path, "main", "dataset").sha for path in sorted(paths) if path.count("/") == 1}


def _leaves(index: TaskIndex, name: str, seen: frozenset[str] = frozenset()) -> Iterator[Definition]:
    """Yield the definitions of the single tasks behind a task, group or tag."""
    entry = index.get(name)
    if entry is None or name in seen:
        return
    if not _has_members(entry):
        yield entry.cfg or {}
    for member in _members(entry):
        if member is not None:
            yield from _leaves(index, member, seen | {name})


def _has_members(entry: Entry) -> bool:
    """Check whether an entry of the index is a tag, or a group with a list of its members."""
    return entry.kind.name == "TAG" or (entry.kind.name == "GROUP" and isinstance((entry.cfg or {}).get("task"), list))


def _members(entry: Entry) -> list[str | None]:
    """Name the members of a tag or a group; None for a member without a name of its own."""
    if not _has_members(entry):
        return []
    members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {})["task"]
    names = [member if isinstance(member, str) else member.get("task") or member.get("group") for member in members]
    return [name if isinstance(name, str) else None for name in names]


def _score_settings(settings: Eval) -> dict[str, Any]:
    """Return the settings that shape the scores. The batch size does so only by float noise."""
    return {**settings.model_dump(exclude={"batch_size", "definitions"}), "definitions": _digest(settings.definitions)}


def _digest(folder: str | None) -> str:
    """Return the digest of a folder of definitions: YAML, Python and data. Empty without a folder."""
    if folder is None:
        return ""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return digest_of([(str(path.relative_to(folder)), sha256_of(path)) for path in files])


def _task_index(settings: Eval) -> TaskIndex:
    index: TaskIndex = _task_manager(settings).task_index
    return index


def _task_manager(settings: Eval) -> Any:
    """Return lm-eval's TaskManager. Making one runs no code of a task: lm-eval runs it when it loads the task.

    lm-eval's own tasks are read only if those in the user's folder do not suffice. Where both have a task of the same
    name, lm-eval takes the user's in either case.
    """
    folder, digest = settings.definitions, _digest(settings.definitions)
    if folder is not None:
        own = _cached_manager(folder, digest, lm_evals_own=False)
        if all(_is_complete(own.task_index, name) for name in settings.tasks):
            return own
    return _cached_manager(folder, digest, lm_evals_own=True)


def _is_complete(index: TaskIndex, name: str, above: frozenset[str] = frozenset()) -> bool:
    """Check whether an index holds a task and all of its members."""
    if name not in index or name in above:
        return False
    members = _members(index[name])
    return all(member is not None and _is_complete(index, member, above | {name}) for member in members)


@lru_cache(maxsize=2)
def _cached_manager(folder: str | None, digest: str, *, lm_evals_own: bool) -> Any:
    """Read an index. lm-eval's own tasks are 14,000 files, which takes 8 s. A changed `digest` misses the cache."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=lm_evals_own)
