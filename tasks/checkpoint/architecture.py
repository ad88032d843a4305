"""Whether an architecture can be loaded: what transformers knows, from its source, without importing it or torch."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.untrusted import shown

# Weights of these lie transposed (transformers' Conv1D): packed, they are no longer the base's matrices.
TRANSPOSED = {"gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"}


def architecture_problem(
    config: Mapping[str, Any], known: Container[str], *, allow_remote_code: bool = False
) -> str | None:
    """Why a base of this config cannot be loaded, or None. known: the model types of transformers."""
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
    """The model types that the installed transformers has a config for; None where its source does not tell."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "models" / "auto"
    found: set[str] = set()
    for name in ("auto_mappings.py", "configuration_auto.py"):
        path = folder / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        found |= set(re.findall(r'"([\w.-]+)"(?:,|:) "\w+Config"', text))
    return frozenset(found) or None
