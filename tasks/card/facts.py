"""What a model card is made of: the recipe, what came of it, and what every stage recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import requant
from requant.tasks.hub.revision import Revision
from requant.tasks.plots import Picture
from requant.tasks.recipe.quantize import Quantize
from requant.tasks.recipe.recipe import PACKED_HEADS, Recipe
from requant.tasks.validating.gates import Gate


@dataclass(frozen=True)
class FileFacts:
    """What a card tells of the files of a result and of its base."""

    digest: str  # of the artifact
    weights_bytes: int
    base_weights_bytes: int
    kept_names: tuple[str, ...]  # of tensors that are not packed
    kept_reasons: Mapping[str, str] = field(default_factory=dict)  # why layers of decoder blocks are kept, by name
    packing: str | None = None  # as config.json calls it
    fp8: bool = False  # the base holds FP8, which is BF16 in the result
    chat: bool = True  # there is a chat template
    base_card: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of. `measured` and `benchmark` are the values that these stages keep."""

    recipe: Recipe
    base: Revision
    files: FileFacts
    measured: Mapping[str, Any]
    gates: Sequence[Gate]
    benchmark: Mapping[str, Any]
    provenance: Mapping[str, Mapping[str, Any]]  # each stage's record
    pictures: Sequence[Picture] = ()
    others: Mapping[str, Recipe] = field(default_factory=dict)  # what the same run makes of the base beside this
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the plan's verdicts, by engine
    version: str = requant.__version__

    @property
    def model(self) -> str:
        """The repo to serve; before it is published, the folder that the card lies in."""
        return self.recipe.publish.repo_id if self.recipe.publish else "."

    @property
    def title(self) -> str:
        return self.model.split("/")[-1] if self.recipe.publish else "this checkpoint"

    @property
    def head(self) -> bool:
        """Whether the result has an MTP head."""
        return bool(self.measured["head_kept"])

    @property
    def packed_head(self) -> bool:
        """Whether an MTP head, if there is one, is packed."""
        return self.recipe.mtp in PACKED_HEADS

    @property
    def vision(self) -> bool:
        return any(re.search(r"(^|\.)(visual|vision)", name) for name in self.files.kept_names)

    @property
    def bits(self) -> int:
        return self.recipe.quantize.resolved[0]

    @property
    def calibration(self) -> str:
        """The calibration text, pinned to what it was."""
        return str(self.provenance.get("quantize", {}).get("calibration") or self.recipe.quantize.calibration)

    @property
    def tools(self) -> dict[str, str]:
        """Versions by tool; Python's and torch's as the quantize stage had them."""
        quantize = self.provenance.get("quantize", {})
        versions = {
            "requant": self.version,
            "Python": (quantize.get("machine") or {}).get("python"),
            "torch": (quantize.get("settings") or {}).get("torch"),
        }
        for record in self.provenance.values():
            versions |= record.get("tools") or {}
        return {name: version for name, version in versions.items() if version}


def scheme_words(quantize: Quantize) -> str:
    """Name the bits, groups and symmetry of a scheme."""
    bits, group_size, sym = quantize.asked
    groups = "one scale a row" if group_size == -1 else f"group size {group_size}"
    return f"W{bits}A16, {groups}, {'symmetric' if sym else 'asymmetric'}"
