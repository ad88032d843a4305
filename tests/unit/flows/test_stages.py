"""The stages as tasks of Prefect."""

from __future__ import annotations

from requant.flows.stages import quantize_task
from requant.tasks.quantizing.memory_fallback import TIMEOUT_S


def test_quantize_says_that_it_took_too_long_before_prefect_ends_its_task() -> None:
    assert quantize_task.timeout_seconds is not None and TIMEOUT_S < quantize_task.timeout_seconds == 48 * 3600
