"""Plan the stages of one result: which would run, and what each moves, takes and costs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from requant.tasks.artifact import Manifest
from requant.tasks.planning.base_headers import BaseHeaders
from requant.tasks.planning.document import PlannedHardware, PlannedStage, StageName
from requant.tasks.planning.durations import (
    Estimate,
    estimate_quantize,
    estimate_stage,
    estimate_writing,
    requested_hardware,
)
from requant.tasks.planning.output import CheckpointPlan
from requant.tasks.planning.transfers import download_bytes, upload_bytes
from requant.tasks.recipe.recipe import Recipe

# Stages whose GPU time costs money.
ON_GPU = {"self_calibration", "quantize", "validate", "benchmark", "acceptance", "probe"}
LINEAR_ATTENTION = re.compile(r"\.linear_attn\.")


def plan_stages(
    recipe: Recipe,
    base: BaseHeaders,
    output: CheckpointPlan,
    done: Mapping[str, Manifest],
    shared: Collection[str],
    text_tokens: int | None,
    left_out: Collection[str] = (),
) -> Iterator[PlannedStage]:
    """Yield the stages in the order of a run.

    `done` has the artifacts that are in the store, by stage. `shared` names the stages that an earlier output of the
    same run will have done. `text_tokens` is how much calibration text the base writes, None if it writes none, and
    `left_out` are the stages that this run does not have.
    """
    for name, size_bytes in _moved_bytes(recipe, base, output, done, text_tokens).items():
        if name in left_out:
            continue
        holder = "the store has it" if name in done else "an output before it" if name in shared else None
        if name == "publish" and not size_bytes:
            holder = "the Hub has it"
        if holder is not None:
            estimate = Estimate(0.0, holder)
        elif name == "quantize":
            modules = (m for m in output.choice.quantized if LINEAR_ATTENTION.search(m))
            linear = {module.partition(".linear_attn.")[0] for module in modules}
            estimate = estimate_quantize(base.store, recipe, output.block_parameters, linear)
        elif name == "self_calibration":
            estimate = estimate_writing(base.store, recipe, base.source.nbytes, text_tokens or 0)
        else:
            estimate = estimate_stage(base.store, name, recipe, size_bytes)
        yield PlannedStage(
            name=name,
            state="run" if holder is None else "reused",
            bytes=size_bytes if holder is None else 0,
            seconds=round(estimate.seconds, 1),
            cost=_cost(recipe, name, estimate.seconds),
            figure=estimate.source,
        )


def _moved_bytes(
    recipe: Recipe,
    base: BaseHeaders,
    output: CheckpointPlan,
    done: Mapping[str, Manifest],
    text_tokens: int | None,
) -> dict[StageName, int]:
    """Count the bytes that each stage fetches, writes, reads or sends."""
    result_bytes = sum(output.sizes.values())
    moved: dict[StageName, int] = {
        "download": download_bytes(base.store, base.revision, base.hashes),
        **({} if base.merge is None else {"merge": base.merge.size_bytes}),
        **({} if text_tokens is None else {"self_calibration": base.revision.size}),
        "quantize": sum(output.before_head.values()),
        "mtp_fix": output.head_bytes,
        "validate": base.revision.size + result_bytes,
        "benchmark": result_bytes,
        "acceptance": base.revision.size + result_bytes,
    }
    if recipe.probes is not None:
        moved["probe"] = base.revision.size + result_bytes
    if recipe.publish is not None:
        moved["publish"] = upload_bytes(recipe, done.get("mtp_fix"), result_bytes)
    return moved


def _cost(recipe: Recipe, stage: str, seconds: float) -> float | None:
    price = recipe.hardware.price_per_hour if recipe.hardware else None
    return round(seconds / 3600 * price, 4) if price is not None and stage in ON_GPU else None


def total_hardware(recipe: Recipe, stages: Iterable[PlannedStage]) -> PlannedHardware:
    """Add up the time and cost of the stages on the hardware that the recipe names."""
    rows = list(stages)
    costs = [stage.cost for stage in rows if stage.cost is not None]
    return PlannedHardware(
        gpu=requested_hardware(recipe),
        seconds=round(sum(stage.seconds for stage in rows), 1),
        price_per_hour=recipe.hardware.price_per_hour if recipe.hardware else None,
        cost=round(sum(costs), 2) if costs else None,
    )
