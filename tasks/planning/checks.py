"""Find what would stop a run, before the base is laid out."""

from __future__ import annotations

from collections.abc import Iterator

from requant.tasks.checkpoint.architecture import architecture_problem, known_model_types
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts, unknown_layout
from requant.tasks.quantizing.auto_settings import unknown_layer
from requant.tasks.recipe.recipe import Recipe


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
