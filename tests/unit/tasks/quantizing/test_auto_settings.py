"""Settings left to the machine, with their reasons."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from requant.tasks.quantizing.auto_settings import choose
from tests.factories.quantizing import job_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.config = SimpleNamespace(hidden_size=8, intermediate_size=16)


def chosen(device: str, *, free: int | None = None, same_bits: bool = False, **asked: Any) -> dict[str, Any]:
    """Each setting with its reason."""
    job = job_of(**{"nsamples": 8, "seqlen": 64, "batch_size": 4, **asked})
    settings = choose(job, Model(), device, free, same_bits)
    return {name: (value, settings.reasons.get(name)) for name, value in vars(settings).items() if name != "reasons"}


def test_on_a_gpu_a_block_is_compiled_and_its_samples_stay_there_if_they_fit() -> None:
    found = chosen("cuda", free=10**9)
    assert found["torch_compile"][0] is True and found["low_gpu_mem"][0] is False
    assert chosen("cuda", free=1000)["low_gpu_mem"][0] is True


def test_on_a_cpu_nothing_is_compiled() -> None:
    assert chosen("cpu")["torch_compile"] == (False, "on a CPU compiling takes longer than it saves")


def test_where_the_same_bits_are_wanted_a_block_is_compiled_only_if_that_is_asked_for() -> None:
    value, reason = chosen("cuda", same_bits=True)["torch_compile"]
    assert value is False and "same bits" in reason
    assert chosen("cuda", same_bits=True, torch_compile=True)["torch_compile"] == (True, "asked for")


@pytest.mark.parametrize("asked", ["auto", True])
def test_auto_rounds_own_loop_compares_nothing(asked: Any) -> None:
    assert chosen("cpu", compare_last=asked)["compare_last"][0] is True
    value, reason = chosen("cpu", compare_last=asked, fast=False)["compare_last"]
    assert value is False and "lowest batch" in reason


def test_offloading_goes_without_compiling_whatever_is_asked() -> None:
    assert chosen("cuda", offload=True, torch_compile=True)["torch_compile"][0] is False
