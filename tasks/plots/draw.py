"""All pictures that some values give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from requant.tasks.plots import Picture
from requant.tasks.plots.blocks import block_errors, losses, matrices
from requant.tasks.plots.prompts import acceptance_by_position, acceptance_by_prompt, throughput
from requant.tasks.plots.style import styled


def draw(
    measured: Mapping[str, Any] | None, benchmark: Mapping[str, Any] | None, blocks: Sequence[Mapping[str, Any]]
) -> list[Picture]:
    """The pictures that these values give, in the order in which they are worth looking at.

    `measured` is what validate measured, `benchmark` what the benchmark did, `blocks` the quantize stage's record of
    its blocks. A picture whose values are absent is not made.
    """
    measured, prompts = measured or {}, (benchmark or {}).get("prompts") or []
    with styled():
        made = [
            block_errors(measured.get("blocks") or []),
            matrices(measured.get("matrices") or []),
            losses(blocks),
            acceptance_by_position(
                measured.get("mtp_acceptance_by_position"), measured.get("base_mtp_acceptance_by_position")
            ),
            acceptance_by_prompt(prompts),
            throughput(prompts),
        ]
    return [picture for picture in made if picture is not None]
