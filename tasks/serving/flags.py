"""The flags with which vLLM serves a base or a result, as the recipe's benchmark asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.heads.layouts import has_draft_model
from requant.tasks.checkpoint.mtp import Head
from requant.tasks.checkpoint.served_dtype import Dtype, dtype_of_config
from requant.tasks.recipe.engine_flags import speculates, with_drafts, without_drafts
from requant.tasks.recipe.recipe import Benchmark

OF_RESULT_ONLY = {"quantization", "q"}  # flags that a base cannot be served with


def can_draft(checkpoint: Checkpoint, asked: Benchmark) -> bool:
    """Check whether vLLM drafts for a checkpoint: with its MTP head, or as the recipe's flags say."""
    with_head = checkpoint.head is not None and drafts_by_mtp(checkpoint.head, checkpoint.config)
    return with_head or any(map(speculates, asked.flags))


def drafts_by_mtp(head: Head, config: ModelConfig) -> bool:
    """Check whether vLLM has a draft model for a head by the method `mtp`, as far as the head's layout is known."""
    return (head.known is None or head.known.method == "mtp") and has_draft_model("vllm", config)


def serving_flags(config: Mapping[str, Any], asked: Benchmark, *, drafts: bool) -> dict[str, Any]:
    """Return the recipe's flags for a checkpoint with this config.json, with or without speculative decoding."""
    flags = with_drafts(asked.flags, asked.draft_tokens) if drafts else without_drafts(asked.flags)
    return fitting_flags(config, with_dtype(flags, dtype_of_config(config)))


def with_dtype(flags: Mapping[str, JsonValue], dtype: Dtype | None) -> dict[str, JsonValue]:
    """Add the flag for the dtype to serve in, if it is known and the flags do not have one.

    The engine would choose the same by default. Named, it is what the gates judged and what a reader serves too.
    """
    return dict(flags) if dtype is None or "dtype" in flags else {"dtype": dtype, **flags}


def fitting_flags(config: Mapping[str, Any], flags: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Leave out the flags that say how weights are quantized, unless they are in a checkpoint with this config.json."""
    quantized = "quantization_config" in config
    return {name: value for name, value in flags.items() if quantized or name not in OF_RESULT_ONLY}
