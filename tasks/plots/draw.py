"""All pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence

from requant.tasks.plots import Picture
from requant.tasks.plots.blocks import block_errors, losses, matrices
from requant.tasks.plots.domains import divergence_by_domain
from requant.tasks.plots.prompts import acceptance_by_position, acceptance_by_prompt, throughput
from requant.tasks.plots.style import styled
from requant.tasks.record import RecordedBlock
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.validating.measured import Measured


def draw(
    measured: Measured | None,
    benchmark: BenchmarkResult | None,
    tuned: Sequence[RecordedBlock],
    max_kl_divergence: float | None = None,
) -> list[Picture]:
    """Draw all pictures for which there are values, the most important first.

    `measured` is the result of the stage validate, `benchmark` that of the stage benchmark, and `tuned` are the blocks
    that the stage quantize tuned. `max_kl_divergence` is the limit of the recipe.
    """
    measured, prompts = measured or Measured(), benchmark.prompts if benchmark else ()
    quantized, base = measured.behaviour.quantized, measured.behaviour.base
    with styled():
        pictures = [
            divergence_by_domain(measured.divergence.domains or {}, max_kl_divergence),
            block_errors(measured.divergence.blocks or ()),
            matrices(measured.matrices or ()),
            losses(tuned),
            acceptance_by_position(quantized.mtp_acceptance_by_position, base.mtp_acceptance_by_position),
            acceptance_by_prompt(prompts),
            throughput(prompts),
        ]
    return [picture for picture in pictures if picture is not None]
