"""The stages of one result: which would run, and what each moves, takes and costs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from requant.tasks.artifact import Manifest
from requant.tasks.planning.base_headers import BaseHeaders
from requant.tasks.planning.document import PlannedHardware, PlannedStage, StageName
from requant.tasks.planning.durations import Figure, hardware, quantize_figure, stage_figure
from requant.tasks.planning.output import PlannedOutput, head_bytes, layers_by_block
from requant.tasks.planning.transfers import to_download, to_upload
from requant.tasks.recipe.recipe import Recipe

ON_GPU = {"quantize", "validate", "benchmark"}  # what a GPU is rented for
LINEAR = re.compile(r"\.linear_attn\.")


def plan_stages(
    recipe: Recipe, base: BaseHeaders, output: PlannedOutput, done: Mapping[str, Manifest], shared: Collection[str]
) -> Iterator[PlannedStage]:
    """Yield the stages in the order of a run. `done`: the artifacts that the store has, by stage; `shared`: the stages
    that an output before this one will have done by then."""
    for name, nbytes in _moved_bytes(recipe, base, output, done).items():
        holder = "the store has it" if name in done else "an output before it" if name in shared else None
        if name == "publish" and not nbytes:
            holder = "the Hub has it"
        if holder is not None:
            figure = Figure(0.0, holder)
        elif name == "quantize":
            linear = {m.partition(".linear_attn.")[0] for m in output.choice.packed if LINEAR.search(m)}
            figure = quantize_figure(base.store, recipe, layers_by_block(output), linear)
        else:
            figure = stage_figure(base.store, name, recipe, nbytes)
        yield PlannedStage(
            name=name,
            state="run" if holder is None else "reused",
            bytes=nbytes if holder is None else 0,
            seconds=round(figure.seconds, 1),
            cost=_cost(recipe, name, figure.seconds),
            figure=figure.source,
        )


def _moved_bytes(
    recipe: Recipe, base: BaseHeaders, output: PlannedOutput, done: Mapping[str, Manifest]
) -> dict[StageName, int]:
    """Count what each stage fetches, writes, reads or sends."""
    made = sum(output.sizes.values())
    moved: dict[StageName, int] = {
        "download": to_download(base.store, base.revision, base.hashes),
        "quantize": sum(output.before_head.values()),
        "mtp_fix": head_bytes(output),
        "validate": base.revision.size + made,
        "benchmark": made,
    }
    if recipe.publish is not None:
        moved["publish"] = to_upload(recipe, done.get("mtp_fix"), made)
    return moved


def _cost(recipe: Recipe, stage: str, seconds: float) -> float | None:
    price = recipe.hardware.price_per_hour if recipe.hardware else None
    return round(seconds / 3600 * price, 4) if price is not None and stage in ON_GPU else None


def total_hardware(recipe: Recipe, stages: Iterable[PlannedStage]) -> PlannedHardware:
    """Add up what the stages take of the hardware that the recipe names."""
    rows = list(stages)
    costs = [stage.cost for stage in rows if stage.cost is not None]
    return PlannedHardware(
        gpu=hardware(recipe),
        seconds=round(sum(stage.seconds for stage in rows), 1),
        price_per_hour=recipe.hardware.price_per_hour if recipe.hardware else None,
        cost=round(sum(costs), 2) if costs else None,
    )
