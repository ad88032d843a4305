"""evaluate: lm-eval tasks named in the recipe, the base beside the quantized model.

One benchmark alone hides damage: the task that kept least of the base's score is compared with the gate. The scores of
a checkpoint are kept, so a base is evaluated once for all that is made of it. Needs `requant[eval]`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.tasks.artifact import Manifest, digest_of, sha256_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.writer import write_json
from requant.tasks.errors import EvaluationFailed, HubUnavailable, RecipeError, RequantError
from requant.tasks.hub.revision import resolve
from requant.tasks.pipeline.stage import Made, Stage, put_files, run_stage
from requant.tasks.recipe.recipe import Eval, Recipe
from requant.tasks.store import Store

if TYPE_CHECKING:
    import torch

STAGE = Stage("evaluate", 1, tools=("lm_eval", "transformers"))
RESULT_FILE = "scores.json"
SEED = 1234  # of few-shot examples and bootstrap
BOOTSTRAP = 1000  # draws, for the standard error of metrics that are no mean
Scores = dict[str, dict[str, Any]]  # by task
log = logging.getLogger(__name__)
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def check_tasks(settings: Eval | None) -> None:
    """Find out before any work whether these tasks can be run here. Raises RecipeError."""
    if settings is None:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(f"eval.tasks: {settings.tasks[0]} needs lm-eval: pip install 'requant[eval]'")
    if settings.definitions is not None and not os.path.isdir(settings.definitions):
        raise RecipeError(f"eval.definitions: the folder {settings.definitions} does not exist: correct the path")
    known = _manager(settings).task_index
    for name in settings.tasks:
        if name not in known:
            raise RecipeError(f"eval.tasks: lm-eval has no task {name}: `lm_eval ls tasks` lists them")
        for leaf in _leaves(known, name):
            if leaf.get("unsafe_code"):
                raise RecipeError(
                    f"eval.tasks: {name} runs code that the model writes, and this machine is no sandbox: leave it out"
                )


def asked(settings: Eval | None) -> dict[str, Any]:
    """What is asked for, as a part of a stage key: settings and definitions. Nothing if there are no tasks."""
    if settings is None:
        return {}
    return {"eval": {**_asked(settings), "lm_eval": STAGE.locked["lm_eval"]}}


def evaluated(
    store: Store,
    recipe: Recipe,
    checkpoint: Manifest,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> Scores:
    """The scores of one checkpoint, kept by what it holds, what is asked and the data sets' commits at this moment."""
    assert recipe.eval is not None
    settings = recipe.eval
    data = data_sets(settings)
    key = STAGE.key(
        reads={"checkpoint": checkpoint.digest, "data": digest_of(data)},
        settings={**_asked(settings), "device": device.type, "dtype": str(dtype)},
    )

    def work(scratch: Path) -> Made:
        log.info(f"evaluating {folder.name} on {', '.join(settings.tasks)}")
        scores = evaluate(folder, settings, device, dtype, remote_code=recipe.allow_remote_code)
        files = [write_json(scratch, RESULT_FILE, scores)]
        put_files(store, scratch, files)
        return Made(Manifest.of(files), {"scores": scores, "data": data})

    found: Scores = json.loads(store.read_blob(run_stage(store, STAGE, key, work).manifest[RESULT_FILE]))
    return found


def evaluate(
    folder: Path, settings: Eval, device: torch.device, dtype: torch.dtype, *, remote_code: bool = False
) -> Scores:
    """Scores by task: {metric, value, stderr, samples, higher_is_better}; the first metric of each task.

    A group that lm-eval aggregates is one task, any other and a tag are their members. Raises EvaluationFailed, or
    HubUnavailable where a data set cannot be fetched at the moment.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork this process for each bootstrap
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from requant.tasks.validating.model import free, load_model, load_tokenizer

    model = load_model(Checkpoint.open(folder).sound(), dtype, device, remote_code=remote_code)
    tokenizer = load_tokenizer(folder, remote_code=remote_code)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints, and stdout may be a document's
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=settings.batch_size),
                tasks=list(settings.tasks),
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                apply_chat_template=settings.chat_template,
                task_manager=_manager(settings),
                log_samples=False,
                bootstrap_iters=BOOTSTRAP,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
    except (RequantError, MemoryError):
        raise
    except Exception as error:  # whatever a task, its data set or its metric raises
        if type(error).__name__ == "OutOfMemoryError":
            raise
        first = next(iter(str(error).splitlines()), "")
        kind = HubUnavailable if isinstance(error, ConnectionError) else EvaluationFailed
        raise kind(f"lm-eval failed on {', '.join(settings.tasks)} ({type(error).__name__}: {first[:300]})") from error
    del model
    free(device)
    return _scores(found)


def _scores(found: Mapping[str, Any]) -> Scores:
    """The first metric of each entry of lm-eval's results; members of an aggregated group are in their group."""
    scores = {}
    for name, entry in found["results"].items():
        metrics = [key for key in entry if "," in key and "_stderr," not in key]
        values = [(key, entry[key]) for key in metrics if isinstance(entry[key], int | float)]
        if not values:
            continue
        (key, value), *_ = values
        metric, _, how = key.partition(",")
        stderr = entry.get(f"{metric}_stderr,{how}")
        scores[name] = {
            "metric": metric if how == "none" else f"{metric}, {how}",
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            "samples": entry.get("sample_len"),
            "higher_is_better": bool(found["higher_is_better"].get(name, {}).get(metric, True)),
        }
    grouped = {
        member for group, members in found.get("group_subtasks", {}).items() if group in scores for member in members
    }
    return {name: score for name, score in scores.items() if name not in grouped}


def recovery(base: Mapping[str, Mapping[str, Any]], ours: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values that validate keeps: `tasks` {name: {metric, base, ours, recovery, ...}} and `worst_task_recovery`.

    recovery is ours over the base's, or the base's over ours where less is better. None where the base scores nothing:
    such a task shows nothing, and so the worst is None too.
    """
    tasks = {}
    for name, theirs in base.items():
        own = ours[name]
        above, below = (own, theirs) if theirs["higher_is_better"] else (theirs, own)
        share = above["value"] / below["value"] if theirs["value"] > 0 and below["value"] > 0 else None
        tasks[name] = {
            "metric": theirs["metric"],
            "base": theirs["value"],
            "ours": own["value"],
            "recovery": share,
            "base_stderr": theirs["stderr"],
            "stderr": own["stderr"],
            "samples": theirs["samples"],
        }
    shares = [task["recovery"] for task in tasks.values()]
    return {"tasks": tasks, "worst_task_recovery": min(shares) if shares and None not in shares else None}


def whole(base: Path) -> tuple[torch.device, torch.dtype]:
    """Where and in what a base, and what is made of it, is evaluated: all of it is in memory at once."""
    from requant.tasks.validating.model import pick_device, pick_dtype

    parameters = sum(math.prod(tensor.shape) for tensor in Checkpoint.open(base).tensors.values())
    device = pick_device(parameters)
    return device, pick_dtype(parameters, device)


def data_sets(settings: Eval) -> dict[str, str]:
    """The Hub data sets that the tasks name, and their commits now."""
    known = _manager(settings).task_index
    paths = {str(leaf.get("dataset_path")) for name in settings.tasks for leaf in _leaves(known, name)}
    return {path: resolve(path, "main", "dataset").sha for path in sorted(paths) if path.count("/") == 1}


def _leaves(known: Mapping[str, Any], name: str, seen: frozenset[str] = frozenset()) -> Iterable[Mapping[str, Any]]:
    """The definitions of the tasks that a task, group or tag stands for."""
    entry = known.get(name)
    if entry is None or name in seen:
        return
    if not _stands_for_others(entry):
        yield entry.cfg or {}
    for member in _members(entry):
        if member is not None:
            yield from _leaves(known, member, seen | {name})


def _stands_for_others(entry: Any) -> bool:
    """Tell whether an entry of the index is a tag, or a group with a list of its members."""
    return entry.kind.name == "TAG" or (entry.kind.name == "GROUP" and isinstance((entry.cfg or {}).get("task"), list))


def _members(entry: Any) -> list[str | None]:
    """Name what a tag or a group stands for; None for a member without a name of its own."""
    if not _stands_for_others(entry):
        return []
    members = entry.tags if entry.kind.name == "TAG" else entry.cfg["task"]
    inner = [each if isinstance(each, str) else each.get("task") or each.get("group") for each in members]
    return [each if isinstance(each, str) else None for each in inner]


def _asked(settings: Eval) -> dict[str, Any]:
    """What shapes the scores. The batch size does so by float noise alone."""
    return {**settings.model_dump(exclude={"batch_size", "definitions"}), "definitions": _digest(settings.definitions)}


def _digest(folder: str | None) -> str:
    """What a folder of definitions holds: YAML, Python and data. Empty without one."""
    if folder is None:
        return ""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return digest_of([(str(path.relative_to(folder)), sha256_of(path)) for path in files])


def _manager(settings: Eval) -> Any:
    """Give lm-eval's index of tasks. Reading it runs nothing: what it would run is loaded with a task.

    lm-eval's own tasks are read only where those in the user's folder do not suffice. Of two tasks of one name it takes
    the user's in any case.
    """
    folder, digest = settings.definitions, _digest(settings.definitions)
    if folder is not None:
        own = _index(folder, digest, lm_evals=False)
        if all(_is_whole(own.task_index, name) for name in settings.tasks):
            return own
    return _index(folder, digest, lm_evals=True)


def _is_whole(known: Mapping[str, Any], name: str, above: frozenset[str] = frozenset()) -> bool:
    """Tell whether a task is in an index, and all that it stands for."""
    if name not in known or name in above:
        return False
    members = _members(known[name])
    return all(member is not None and _is_whole(known, member, above | {name}) for member in members)


@lru_cache(maxsize=2)
def _index(folder: str | None, digest: str, *, lm_evals: bool) -> Any:
    """Read an index. lm-eval's own tasks are 14,000 files: 8 s. `digest` says when a folder is another."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=lm_evals)
