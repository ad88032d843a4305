"""What would stop a run, as the sentences that it would stop with."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tasks.checkpoint.architecture import architecture_problem, known_model_types
from tasks.checkpoint.checkpoint import Checkpoint
from tasks.checkpoint.experts import one_by_one, unknown_layout
from tasks.checkpoint.fp8 import plain
from tasks.checkpoint.head import check_head
from tasks.errors import CheckpointError
from tasks.quantizing.choose import unknown_layer
from tasks.recipe import Recipe


def check_base(base: Checkpoint, recipe: Recipe) -> None:
    """Raises CheckpointError if a base cannot become what the recipe asks for: found out before hours of work."""
    try:
        base.sound()
        if any(module.quantized for module in plain(base).modules.values()):
            raise CheckpointError("it is already quantized: name the base that it was made of")
        if recipe.mtp != "drop":
            check_head(base)
    except CheckpointError as error:
        sentence = str(error).replace(f"{base.folder}{os.sep}", "").replace(str(base.folder), "it")
        raise CheckpointError(f"the base {recipe.base.repo_id} cannot be used: {sentence}") from error


def refusals(base: Checkpoint, recipe: Recipe) -> Iterator[str]:
    """What is wrong with a base or the recipe's words for it, but for what only laying it out shows."""
    known = known_model_types()
    if known is not None:
        problem = architecture_problem(base.config, known, allow_remote_code=recipe.allow_remote_code)
        if problem:
            yield problem
    base = one_by_one(base)
    fused = unknown_layout(base)
    if fused:
        yield fused
    modules = {name.rpartition(".")[0] for name in base.tensors}
    unknown = unknown_layer(recipe.quantize.layers, {*modules, "lm_head"})
    if unknown:
        yield unknown
