"""Combine the plans of several outputs of one base into one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from requant.tasks.artifact import digest_of
from requant.tasks.checkpoint.document import EngineVerdict
from requant.tasks.planning.document import (
    MemoryNeeds,
    Needs,
    OutputTotals,
    Plan,
    PlanDocument,
    PlannedHardware,
    PlannedOutput,
    PlannedStage,
    StageNeeds,
    Transfers,
    UnknownNeeds,
)
from requant.tasks.planning.output import CheckpointPlan
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.writing.amount import writes_text

Number = TypeVar("Number", int, float)


@dataclass
class EarlierOutputs:
    """The outputs that a run makes before another one: their recipes, and the bytes of disk that they keep occupied.

    `names` has the name of each output by what it comes to for the base, however the recipe spells that.
    """

    recipes: list[Recipe] = field(default_factory=list)
    kept_bytes: int = 0
    names: dict[str, str] = field(default_factory=dict)

    def add(self, recipe: Recipe, plan: Plan) -> None:
        """Add an output with its plan. One that cannot be made is left out."""
        if not plan.stages:
            return
        self.recipes.append(recipe)
        if any(stage.state == "run" for stage in plan.stages if stage.name in {"quantize", "mtp_fix"}):
            self.kept_bytes += plan.output.bytes or 0

    def find_same(self, name: str, recipe: Recipe, output: CheckpointPlan) -> str | None:
        """Say that an earlier output comes to the same as this one; None if there is none."""
        packing = output.choice.quantization["packing_format"]
        settings = recipe.quantize.model_copy(update={"layers": {}, "format": packing})
        # Without a head, nothing depends on what the recipe says of it.
        mtp = recipe.mtp if output.source.head is not None else "keep"
        settled = recipe.model_copy(update={"quantize": settings, "mtp": mtp})
        made = digest_of([settled.makes, output.choice.quantization, sorted(output.choice.quantized)])
        first = self.names.setdefault(made, name)
        if first == name:
            return None
        return f"for this base it comes to the same as output {first}, packed as {packing}: take one of them out"

    def as_spelled(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the spelling of the first output that quantizes as it does, so that both share that.

        The stage key of quantize has the settings as they are spelled: `bits: 8` is not `scheme: W8A16` there.
        """
        same = (one.quantize for one in self.recipes if one.quantize.makes == recipe.quantize.makes)
        quantize = next(same, recipe.quantize)
        return recipe if quantize is recipe.quantize else recipe.model_copy(update={"quantize": quantize})

    def stages(self, recipe: Recipe) -> set[str]:
        """Return the stages that the run of another recipe reuses from these outputs (see `as_spelled`)."""
        quantized = any(one.quantize == recipe.quantize for one in self.recipes)
        merge = ["merge"] if recipe.adapter is not None else []
        of_base = ["download", *merge, *(["self_calibration"] if writes_text(recipe) else [])]
        return {*(of_base if self.recipes else []), *(["quantize"] if quantized else [])}


def combine_plans(recipe: Recipe, plans: Mapping[str, Plan]) -> PlanDocument:
    """Combine the plans of all outputs, by name. Bytes, seconds and costs are added up; of needs the largest counts."""
    every = list(plans.values())
    targets = {name: one.publish.repo_id if one.publish else None for name, one in recipe.each.items()}
    return PlanDocument(
        base=max((plan.base for plan in every), key=lambda base: base.tensors or 0),
        stages=_stages(plans),
        output=OutputTotals(bytes=_sum(plan.output.bytes for plan in every), quantized_tensors=None, kept_tensors=None),
        needs=_most([plan.needs for plan in every]),
        transfer=Transfers(
            download_bytes=sum(plan.transfer.download_bytes for plan in every),
            upload_bytes=sum(plan.transfer.upload_bytes for plan in every),
        ),
        engines=_engines(plans),
        hardware=PlannedHardware(
            gpu=every[0].hardware.gpu,
            seconds=round(sum(plan.hardware.seconds for plan in every), 1),
            price_per_hour=every[0].hardware.price_per_hour,
            cost=_sum(plan.hardware.cost for plan in every),
        ),
        changes=next((plan.changes for plan in every if plan.changes is not None), None),
        notes=_sentences(plans, "notes"),
        problems=_sentences(plans, "problems"),
        warnings=_sentences(plans, "warnings"),
        outputs=tuple(PlannedOutput.of(name, targets[name], plan) for name, plan in plans.items()),
    )


def _stages(plans: Mapping[str, Plan]) -> tuple[PlannedStage, ...]:
    """List the stages of all outputs, each with its output's name. Those on the base alone are for the first one."""
    stages = [stage.model_copy(update={"output": name}) for name, plan in plans.items() for stage in plan.stages]
    shared = ("download", "merge", "self_calibration")
    first = {name: next((stage for stage in stages if stage.name == name), None) for name in shared}
    return tuple(stage for stage in stages if stage.name not in first or stage is first[stage.name])


def _sum(values: Iterable[Number | None]) -> Number | None:
    """Add up the values that are known; None if there are none."""
    known = [value for value in values if value is not None]
    return round(sum(known), 2) if known else None


def _most(needs: Sequence[Needs | UnknownNeeds]) -> Needs | UnknownNeeds:
    """Return the largest need of each kind: the outputs are made one after the other."""
    known = [need for need in needs if isinstance(need, Needs)]
    if not known:
        return UnknownNeeds(disk_bytes=None, ram_bytes=None, vram_bytes=None)
    names = dict.fromkeys(name for need in known for name in need.stages)
    return Needs(
        disk_bytes=max(need.disk_bytes for need in known),
        ram_bytes=max(need.ram_bytes for need in known),
        vram_bytes=max(need.vram_bytes for need in known),
        low_gpu_mem=MemoryNeeds(
            ram_bytes=max(need.low_gpu_mem.ram_bytes for need in known),
            vram_bytes=max(need.low_gpu_mem.vram_bytes for need in known),
        ),
        stages={name: _most_of_stage([need.stages[name] for need in known if name in need.stages]) for name in names},
    )


def _most_of_stage(needs: Collection[StageNeeds]) -> StageNeeds:
    def most(key: str) -> int | None:
        return max((value for need in needs if (value := getattr(need, key)) is not None), default=None)

    return StageNeeds(**{key: most(key) for key in StageNeeds.model_fields})


def _engines(plans: Mapping[str, Plan]) -> dict[str, EngineVerdict]:
    """Return the worst verdict of each engine. If the verdicts differ, its reason names the output."""
    worst: dict[str, EngineVerdict] = {}
    for engine in dict.fromkeys(engine for plan in plans.values() for engine in plan.engines):
        verdicts = {name: plan.engines[engine] for name, plan in plans.items() if engine in plan.engines}
        name, verdict = min(verdicts.items(), key=lambda item: item[1].rank)
        alike = all(other == verdict for other in verdicts.values())
        worst[engine] = verdict if alike else verdict.model_copy(update={"reason": f"{name}: {verdict.reason}"})
    return worst


def _sentences(plans: Mapping[str, Plan], kind: Literal["notes", "problems", "warnings"]) -> tuple[str, ...]:
    """List each sentence once. One that does not hold for all outputs gets the name of its output."""
    by_output: dict[str, tuple[str, ...]] = {name: getattr(plan, kind) for name, plan in plans.items()}
    common = set[str].intersection(*map(set, by_output.values()))
    rows = [s if s in common else f"{name}: {s}" for name, sentences in by_output.items() for s in sentences]
    return tuple(dict.fromkeys(rows))
