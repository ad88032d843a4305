"""The flags with which vLLM serves a base or a result, as the recipe's benchmark asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.recipe.engine_flags import speculates, with_drafts, without_drafts
from requant.tasks.recipe.recipe import Benchmark

OF_RESULT_ONLY = {"quantization", "q"}  # flags that a base cannot be served with


def can_draft(checkpoint: Checkpoint, asked: Benchmark) -> bool:
    """Check whether vLLM drafts for a checkpoint: with its MTP head, or as the recipe's flags say."""
    return checkpoint.head is not None or any(map(speculates, asked.flags))


def serving_flags(config: Mapping[str, Any], asked: Benchmark, *, drafts: bool) -> dict[str, Any]:
    """Return vLLM's flags for a checkpoint with this config.json: the recipe's, with or without speculative decoding.

    Those that say how weights are quantized are left out for a checkpoint that is not.
    """
    flags = with_drafts(asked.flags, asked.draft_tokens) if drafts else without_drafts(asked.flags)
    if "quantization_config" in config:
        return flags
    return {name: value for name, value in flags.items() if name not in OF_RESULT_ONLY}
