"""On how many GPUs a job is done, and which GPU each process sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from requant.tasks.quantizing import peers
from requant.tasks.quantizing.events import JobRefused
from requant.tasks.recipe.quantize_section import Quantize


@pytest.mark.parametrize(("settings", "device", "count"), [
    ({}, "cuda", 1), ({"gpus": "auto"}, "cuda", 4), ({"gpus": 2}, "cuda", 2), ({"gpus": "auto"}, "cuda:1", 1),
    ({"gpus": "auto"}, "cpu", 1), ({"gpus": 3}, "cpu", 3), ({"gpus": 2, "fast": False}, "cuda", 1),
    ({"gpus": "auto", "iters": 0}, "cuda", 1),
])  # fmt: skip
def test_a_job_is_done_on_as_many_gpus_as_asked_where_they_can_share_it(
    settings: dict[str, Any], device: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert peers.count_gpus(Quantize.model_validate(settings), device) == count


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(JobRefused, match="gpus is 2, and this machine has 1: lower it, or write auto"):
        peers.count_gpus(Quantize(gpus=2), "cuda")
    with pytest.raises(ValueError, match="device cuda:1 is one GPU, and gpus is 2"):
        Quantize(gpus=2, device="cuda:1")


@pytest.mark.parametrize(("visible", "seen"), [(None, "2"), ("4,5,6", "6")])
def test_a_peer_sees_the_gpu_of_its_rank(visible: str | None, seen: str) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert peers._environment(2, environment)["CUDA_VISIBLE_DEVICES"] == seen
