"""What validate records of a good checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from requant.tasks.validating import measure as measuring
from requant.tasks.validating import windows as cutting
from requant.tasks.validating.measured import Measured

GOOD: dict[str, Any] = {
    "unaccounted": [],
    "altered": [],
    "not_finite": [],
    "files": [],
    "context": [],
    "matrices": [
        {
            "name": "a.weight",
            "bits": 4,
            "slope": 0.99,
            "offset": 0.01,
            "error": 0.1,
            "slope_excess": 0.002,
            "scale_factor": 1.003,
            "rounding_noise": 0.01,
        },
        {
            "name": "b.weight",
            "bits": 2,
            "slope": 0.87,
            "offset": -0.06,
            "error": 0.4,
            "slope_excess": -0.02,
            "scale_factor": 0.98,
            "rounding_noise": 0.16,
        },
    ],
    "blocks": [
        {"block": 0, "kind": "linear_attention", "error": 0.1, "drift": 0.05},
        {"block": 1, "kind": "full_attention", "error": 0.2, "drift": 0.07},
    ],
    "same_tokens": 1.0,
    "perplexity_increase": 0.01,
    "kl_divergence": 0.02,
    "top1_agreement": 0.95,
    "most_repeated_token": 0.1,
    "long_context": 1.0,
    "vision": True,
    "vision_difference": 0.0,
    "mtp_acceptance_ratio": 0.99,
    "speculative_agreement": 1.0,
    "head_kept": True,
}


def good(**changes: Any) -> Measured:
    """Return what validate measures of a good checkpoint, with changes to its JSON form."""
    return Measured.from_json({**GOOD, **changes})


@contextmanager
def measuring_little(
    *, windows: int, length: int, probe: int, prompts: int, generated: int, longest: int
) -> Iterator[None]:
    """Measure on so many windows of `length` tokens, and decode so many prompts, instead of what a real model takes."""
    values = {"LENGTH": length, "PROBE": probe, "PROMPTS": prompts, "GENERATED": generated}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(measuring, name, value)
        patch.setattr(cutting, "WINDOWS", windows)
        patch.setattr(cutting, "LENGTH", length)
        patch.setitem(measuring.MAX_TEXT_TOKENS, "cpu", longest)
        yield
