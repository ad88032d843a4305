"""The weights of the next block, which are copied while a block is tuned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from requant.tasks.quantizing.next_block import NextBlock

NAMES = ["layers.0", "layers.1", "layers.2"]


@pytest.fixture(autouse=True)
def _unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def model_of_blocks() -> torch.nn.Module:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in NAMES)
    for number, block in enumerate(model.layers):
        torch.nn.init.constant_(block.weight, number)
        block.global_name = NAMES[number]
    return model


def run(following: NextBlock, model: torch.nn.Module, between: Any = lambda number: None) -> list[tuple[int, float]]:
    """Start every block as auto-round does; where its weight lies then, and its value."""
    started: list[tuple[int, float]] = []

    def dispatch(quantizer: Any, block: Any, input_ids: Any, others: Any) -> Any:
        started.append((block.weight.data_ptr(), float(block.weight.detach()[0, 0])))
        return block

    def quantize_blocks(orchestrator: Any, model: Any, inputs: Any, names: list[str]) -> None:
        for number, name in enumerate(names):
            following.starting(dispatch)(None, model.get_submodule(name), None, None)
            between(number)

    following.knowing_names(quantize_blocks)(None, model, None, NAMES)
    return started


def test_all_blocks_but_the_first_start_with_weights_that_were_copied_ahead() -> None:
    model = model_of_blocks()
    before = [block.weight.data_ptr() for block in model.layers]
    started = run(NextBlock(torch.device("cpu")), model)
    assert [value for _, value in started] == [0.0, 1.0, 2.0]
    assert [place == original for (place, _), original in zip(started, before, strict=True)] == [True, False, False]


def test_without_a_device_nothing_is_copied() -> None:
    model = model_of_blocks()
    before = [block.weight.data_ptr() for block in model.layers]
    assert [place for place, _ in run(NextBlock(None), model)] == before


def test_a_block_on_the_cpu_is_tuned_in_memory_of_its_own_and_not_in_the_pages_of_its_file() -> None:
    model = model_of_blocks()
    before = [block.weight.data_ptr() for block in model.layers]
    run(NextBlock(None), model)
    assert all(block.weight.data_ptr() != place for block, place in zip(model.layers, before, strict=True))
    assert [float(block.weight.detach()[0, 0]) for block in model.layers] == [0.0, 1.0, 2.0]


def test_weights_that_were_replaced_after_they_were_copied_are_kept() -> None:
    model = model_of_blocks()

    def replace(number: int) -> None:
        if number == 0:
            model.layers[1].weight.data = torch.full((2, 2), 7.0)

    assert [value for _, value in run(NextBlock(torch.device("cpu")), model, replace)] == [0.0, 7.0, 2.0]


def test_memory_is_cleared_once_per_block_and_at_other_times_as_before() -> None:
    model, following, cleared = model_of_blocks(), NextBlock(None), list[Any]()
    clear = following.sparing(lambda tensors=None, device_list=None: cleared.append(tensors))
    samples = [torch.ones(1), torch.ones(1)]
    run(following, model, lambda number: clear(samples, device_list=["cpu"]))
    assert samples == [None, None] and cleared == []
    clear([3])
    assert cleared == [[3]]


def test_a_block_that_could_not_be_copied_ahead_is_started_as_it_is() -> None:
    model = model_of_blocks()
    assert [value for _, value in run(NextBlock(torch.device("cuda:99")), model)] == [0.0, 1.0, 2.0]
