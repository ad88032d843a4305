"""What a model card is made of: the recipe, what came of it, and what every stage recorded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from requant.tasks.hub.revision import Revision
from requant.tasks.measuring.gates import Gate
from requant.tasks.plots import Picture
from requant.tasks.recipe.quantize import Quantize
from requant.tasks.recipe.recipe import Recipe


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of."""

    recipe: Recipe
    base: Revision
    base_bytes: int
    digest: str
    size: int
    kept_names: tuple[str, ...]
    packing: str | None  # as config.json calls it
    measured: Mapping[str, Any]
    gates: Iterable[Gate]
    benchmark: Mapping[str, Any]
    provenance: Mapping[str, Mapping[str, Any]]
    base_card: str
    pictures: Sequence[Picture] = ()
    chat: bool = True  # it has a chat template
    others: Mapping[str, Recipe] = field(default_factory=dict)  # the recipes of its siblings, by the output's name
    why: Mapping[str, str] = field(default_factory=dict)  # why layers of decoder blocks are not packed, by name
    fp8: bool = False  # the base holds FP8, which is BF16 in the result
    version: str = ""  # of Requant
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # which load it, and draft: the plan's words

    @property
    def head(self) -> bool:
        return bool(self.measured["head_kept"])

    @property
    def vision(self) -> bool:
        return any(re.search(r"(^|\.)(visual|vision)", name) for name in self.kept_names)

    @property
    def scheme(self) -> str:
        return scheme_words(self.recipe.quantize)


def scheme_words(quantize: Quantize) -> str:
    """Bits, groups and symmetry."""
    bits, group_size, sym = quantize.asked
    groups = "one scale a row" if group_size == -1 else f"group size {group_size}"
    return f"W{bits}A16, {groups}, {'symmetric' if sym else 'asymmetric'}"
