"""Find what would stop a run: problems of the base, and a result that no engine loads."""

from __future__ import annotations

from collections.abc import Iterator

from requant.tasks.checkpoint.advice import without_advice
from requant.tasks.checkpoint.architecture import architecture_problem, known_model_types
from requant.tasks.checkpoint.base_check import unusable
from requant.tasks.checkpoint.checkpoint import Ambiguous, Checkpoint, Harmless
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.experts import split_fused_experts, unknown_layout
from requant.tasks.checkpoint.head import check_head
from requant.tasks.checkpoint.problems import problems_of
from requant.tasks.errors import CheckpointError
from requant.tasks.quantizing.auto_settings import unknown_layer
from requant.tasks.recipe.recipe import Recipe

MAX_PROBLEMS = 20  # of a base: requant inspect has them all


def base_problems(base: Checkpoint, recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each reason why this base cannot be quantized as the recipe says."""
    known = known_model_types()
    if known is not None:
        problem = architecture_problem(base.config, known, allow_remote_code=recipe.allow_remote_code)
        if problem:
            yield problem
    base = split_fused_experts(base)
    fused = unknown_layout(base)
    if fused:
        yield fused
    modules = {name.rpartition(".")[0] for name in base.tensors}
    unknown = unknown_layer(recipe.quantize.layers, {*modules, "lm_head"})
    if unknown:
        yield unknown


def inspected(base: Checkpoint, recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return what `requant inspect` says is wrong with a base: what stops a run, and what does not.

    What does not is what readers of a checkpoint do not mind, and an engine that would not draft with the head: that is
    judged on the result. Nothing is said of a head that the recipe drops, nor of one that `check_head` refuses, which
    knows what to change in a recipe.
    """
    judgement = Judgement.of(base)
    hinders, harmless = [], []
    for problem in problems_of(base, judgement, with_head=recipe.mtp != "drop" and _keeps_promise(base)):
        is_harmless = isinstance(problem, Harmless) and not isinstance(problem, Ambiguous)
        told = without_advice(problem)  # the base is the Hub's
        if is_harmless or told == judgement.head_problem:
            harmless.append(f"the base {recipe.base.name}: {told}")
        else:
            hinders.append(str(unusable(recipe.base.name, problem)))
    return _at_most(hinders), _at_most(harmless)


def result_problems(judgement: Judgement) -> list[str]:
    """Say that neither vLLM nor SGLang loads a result, if both verdicts are no. What is not judged stops nothing."""
    problem = judgement.load_problem
    return [] if problem is None else [f"the result would be useless: {problem}"]


def _keeps_promise(base: Checkpoint) -> bool:
    try:
        check_head(base)
    except CheckpointError:
        return False
    return True


def _at_most(sentences: list[str]) -> list[str]:
    """Return MAX_PROBLEMS of some sentences, and one that says how many more there are."""
    more = len(sentences) - MAX_PROBLEMS
    return [*sentences[:MAX_PROBLEMS], f"and {more} more of this kind: see requant inspect"] if more > 0 else sentences
