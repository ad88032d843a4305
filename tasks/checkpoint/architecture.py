"""Checks whether transformers can load an architecture, without importing transformers or torch."""

from __future__ import annotations

import re
from collections.abc import Container
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.untrusted import shown

# Model types that store weights transposed (transformers' Conv1D): quantized, they would not be the base's matrices.
TRANSPOSED = {"gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"}


def architecture_problem(config: ModelConfig, known: Container[str], *, allow_remote_code: bool = False) -> str | None:
    """Return why a base with this config cannot be loaded, or None. `known`: the model types of transformers."""
    kind = config.get("model_type")
    named = shown(repr(kind))
    if isinstance(kind, str) and kind in TRANSPOSED:
        return f"the base's model type {named} stores its matrices transposed: they cannot be packed"
    if isinstance(kind, str) and kind in known:
        return None
    if "auto_map" not in config:
        return f"transformers does not know the base's model type {named}: a newer one may, or another base"
    if not allow_remote_code:
        return f"the base's model type {named} is Python code of its repo: set allow_remote_code to run it"
    return None


@cache
def known_model_types() -> frozenset[str] | None:
    """Return the model types of the installed transformers, or None if its source does not list them as expected."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "models" / "auto"
    types: set[str] = set()
    for name in ("auto_mappings.py", "configuration_auto.py"):
        path = folder / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        types |= set(re.findall(r'"([\w.-]+)"(?:,|:) "\w+Config"', text))
    return frozenset(types) or None
