"""The values that a model card shows: the recipe, its result, and the records of the stages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import requant
from requant.tasks.card.base_card import stated_bases
from requant.tasks.checkpoint.document import EngineVerdict
from requant.tasks.checkpoint.served_dtype import Dtype, dtype_of_flags
from requant.tasks.hub.revision import Revision
from requant.tasks.plots import Picture
from requant.tasks.probing.compare import ProbeSummary
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.recipe.recipe import PACKED_HEADS, Gates, Recipe
from requant.tasks.record import StageRecord
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.validating.drafts import DraftComparison
from requant.tasks.validating.gates import Gate
from requant.tasks.validating.measured import Measured


@dataclass(frozen=True)
class FileFacts:
    """The files of a result and of its base."""

    digest: str  # of the artifact
    weights_bytes: int
    base_weights_bytes: int
    kept_names: tuple[str, ...]  # of tensors that are not quantized
    kept_reasons: Mapping[str, str] = field(default_factory=dict)  # why layers of blocks are not quantized, by name
    packing: str | None = None  # its name in config.json
    dtype: Dtype | None = None  # in which engines serve it by default; None if its config names none
    fp8: bool = False  # whether the base has FP8 tensors, which become BF16 in the result
    by_mtp: bool = True  # whether vLLM has a draft model by the method mtp for the MTP head, if there is one
    chat: bool = True  # whether there is a chat template
    cache_bytes: Mapping[int, int] = field(default_factory=dict)  # of one request, by its tokens, where it is known
    sampling: Mapping[str, float] = field(default_factory=dict)  # what generation_config.json recommends
    base_card: str = ""


@dataclass(frozen=True)
class CardFacts:
    """The values of a card."""

    recipe: Recipe
    base: Revision
    files: FileFacts
    measured: Measured
    gates: Sequence[Gate]
    benchmark: BenchmarkResult
    provenance: Mapping[str, StageRecord]  # by stage
    drafts: DraftComparison | None = None  # in the engine of the benchmark
    probes: ProbeSummary | None = None
    pictures: Sequence[Picture] = ()
    others: Mapping[str, Recipe] = field(default_factory=dict)  # the other outputs of the same run, by name
    engines: Mapping[str, EngineVerdict] = field(default_factory=dict)  # the plan's verdicts, by engine
    version: str = requant.__version__
    commit: str | None = None  # of Requant, where it is known

    @property
    def model(self) -> str:
        """The repo to serve, or for a result that is not published the card's own folder."""
        return self.recipe.publish.repo_id if self.recipe.publish else "."

    @property
    def title(self) -> str:
        name = self.recipe.base.name.split("/")[-1]
        return self.model.split("/")[-1] if self.recipe.publish else f"{name} in {self.bits} bits"

    @property
    def base_models(self) -> str | list[str]:
        """The Hub repos that the front matter names as base: an adapter's repo, whose own card names its base."""
        adapter = self.recipe.adapter
        return adapter.repo_id if adapter is not None and adapter.repo_id is not None else self.own_base_models

    @property
    def own_base_models(self) -> str | list[str]:
        """The Hub repos of the base without its adapter. Of a base in a folder, its own card may name them."""
        if self.recipe.base.repo_id is not None:
            return self.recipe.base.repo_id
        stated = stated_bases(self.files.base_card)
        return stated[0] if len(stated) == 1 else stated

    @property
    def base_relation(self) -> str:
        """How the result comes from `base_models`: what a folder's card names was tuned before it was quantized.

        So was a base that an adapter of no repo is merged into.
        """
        named = self.recipe.adapter or self.recipe.base
        return "quantized" if named.repo_id is not None else "finetune"

    @property
    def unpublished(self) -> str:
        """What of base and adapter lies in a folder of the author's, in words; empty if nothing does."""
        parts = {"the base": self.base, "the adapter": self.base.adapter}
        return " and ".join(name for name, one in parts.items() if one is not None and one.is_local)

    @property
    def dtype(self) -> Dtype | None:
        """The dtype in which the result is served, and in which its scales were judged; None if nobody says."""
        return dtype_of_flags(self.recipe.benchmark.flags) or self.files.dtype

    @property
    def head(self) -> bool:
        """Whether the result has an MTP head."""
        return self.measured.head_kept

    @property
    def packed_head(self) -> bool:
        """Whether an MTP head, if there is one, is quantized."""
        return self.recipe.mtp in PACKED_HEADS

    @property
    def weaker_limits(self) -> list[str]:
        """The limits of gates that are weaker than the defaults, or not there, each beside its default."""
        weaker = []
        for name, field_ in Gates.model_fields.items():
            asked, default = getattr(self.recipe.gates, name), field_.default
            if isinstance(default, float) and (asked is None or (asked - default) * (-1 if "min_" in name else 1) > 0):
                weaker.append(f"{name} {'none' if asked is None else f'{asked:g}'} (by default {default:g})")
        return weaker

    @property
    def vision(self) -> bool:
        return any(re.search(r"(^|\.)(visual|vision)", name) for name in self.files.kept_names)

    @property
    def bits(self) -> int:
        return self.recipe.quantize.resolved.bits

    @property
    def calibration(self) -> str:
        """The calibration texts, each pinned to what it was."""
        named = ", ".join(source.source for source in self.recipe.quantize.sources)
        return self.record("quantize").calibration or named

    @property
    def tools(self) -> dict[str, str]:
        """Versions by tool; Python's and torch's as the quantize stage had them."""
        record = self.record("quantize")
        versions = {"requant": self.version, "Python": record.machine.python, "torch": record.torch}
        for record in self.provenance.values():
            versions |= record.tools
        return {name: version for name, version in versions.items() if version}

    def record(self, stage: str) -> StageRecord:
        """Return the record of a stage; an empty one if the stage did not run."""
        return self.provenance.get(stage, StageRecord())


def scheme_words(quantize: Quantize) -> str:
    """Describe a scheme: its bits, group size and symmetry."""
    bits, group_size, sym = quantize.asked
    groups = "one scale a row" if group_size == -1 else f"group size {group_size}"
    return f"W{bits}A16, {groups}, {'symmetric' if sym else 'asymmetric'}"
