"""Whether a block keeps its last step: only where that is better beyond the noise, and no group lost its scale."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym
from torch import nn

from requant.tasks.quantizing.loop.best_iteration import (
    COMPARED_SAMPLES,
    MIN_PIECES,
    better_parameters,
    gain_of,
    groups_without_scale,
    spread_indices,
)
from requant.tasks.quantizing.loop.flat_weights import FlatWeights, flat_weights
from requant.tasks.quantizing.loop.ranks import ALONE

# Losses of a model with the parameter p in each piece of samples: p = 1 is the last step, p = 0 the lowest batch.
CLEAR = [0.90, 0.91, 0.89, 0.90], [1.00, 1.00, 1.00, 1.00]
NOISY = [0.50, 1.20, 1.10, 1.15], [1.00, 1.00, 1.00, 1.00]


def chosen(losses: tuple[list[float], list[float]], gone: int = 0) -> tuple[str, str | None]:
    """What is kept of a parameter, as reported and as returned."""
    parameter = torch.ones(1)
    events: list[Any] = []

    def measured() -> list[float]:
        return losses[0] if parameter.item() == 1 else losses[1]

    def lost() -> list[torch.Tensor]:
        groups = torch.zeros(8, dtype=torch.bool)
        groups[: 2 + gone * int(parameter.item())] = True  # two of them have no scale either way
        return [groups]

    sizes = [8] * len(losses[0])
    (kept,) = better_parameters([parameter], [torch.zeros(1)], False, measured, sizes, lost, events.append)
    (event,) = events
    assert kept.item() == (event.kept == "last step")
    return event.kept, event.reason


def test_a_last_step_that_is_better_in_every_piece_is_kept() -> None:
    assert chosen(CLEAR) == ("last step", None)


def test_a_last_step_that_is_worse_is_not_kept() -> None:
    kept, reason = chosen((CLEAR[1], CLEAR[0]))
    assert kept == "lowest batch" and reason == "its loss is not lower"


def test_a_difference_within_the_noise_keeps_auto_rounds_choice() -> None:
    """Its mean is lower, by one piece alone."""
    assert sum(NOISY[0]) < sum(NOISY[1])
    kept, reason = chosen(NOISY)
    assert kept == "lowest batch" and reason is not None and "noise" in reason


@pytest.mark.parametrize("pieces", range(1, MIN_PIECES))
def test_too_few_samples_keep_auto_rounds_choice(pieces: int) -> None:
    """As of the two samples of a real model: 776.02 against 776.83."""
    kept, reason = chosen(([776.02] * pieces, [776.83] * pieces))
    assert kept == "lowest batch" and reason is not None and f"of which {MIN_PIECES} are needed" in reason


def test_one_group_that_lost_its_scale_keeps_auto_rounds_choice() -> None:
    assert chosen(CLEAR, gone=1) == ("lowest batch", "1 groups would lose their scale")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_not_lower(bad: float) -> None:
    assert chosen(([bad, *CLEAR[0][1:]], CLEAR[1]))[0] == "lowest batch"


def test_the_gain_and_its_error_are_those_of_the_differences_of_all_samples() -> None:
    gain, error = gain_of(*NOISY, [8] * 4)
    differences = torch.tensor(NOISY[1]) - torch.tensor(NOISY[0])
    assert gain == pytest.approx(float(differences.mean()))
    assert error == pytest.approx(float(differences.std()) / 2)
    assert gain_of([0.5, 1.0], [1.0, 1.1], [3, 1])[0] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("samples", "whole", "batch"), [(128, 8, 8), (128, 16, 16), (512, 64, 16), (2, 2, 8), (5, 5, 8)]
)
def test_enough_pieces_of_one_shape_are_compared_where_there_are_samples(samples: int, whole: int, batch: int) -> None:
    order = spread_indices(samples, whole, batch)
    assert len(order) % whole == 0 and len(set(order)) == len(order) and max(order) < samples
    assert len(order) >= min(samples, COMPARED_SAMPLES, MIN_PIECES * batch)


def layer_with(quantizer: Any, weight: torch.Tensor, coefficient: float) -> FlatWeights:
    """The weights of a layer whose first group has this coefficient of its range, and all others 1."""
    groups = weight.reshape(-1, 32)
    scale = torch.ones(len(groups))
    scale[0] = coefficient
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    layer.bits, layer.group_size, layer.scale_dtype = 4, 32, torch.float16  # type: ignore[assignment]
    params = {"value": torch.zeros_like(groups), "min_scale": scale, "max_scale": scale.clone()}
    wrapper = SimpleNamespace(
        orig_layer=layer, weight_quant_func=quantizer, data_type="int", q_scale_thresh=1e-5,
        weight_min=groups.amin(-1).clamp(max=0), weight_max=groups.amax(-1).clamp(min=0),
        params={name: nn.Parameter(values) for name, values in params.items()},
    )  # fmt: skip
    (flat,) = flat_weights({"layer": wrapper}, ALONE)
    return flat


@pytest.mark.parametrize("quantizer", [quant_tensor_sym, quant_tensor_asym])
def test_a_group_whose_range_a_step_took_has_lost_its_scale(quantizer: Any) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    assert layer_with(quantizer, weight, 0.9).lost_groups().sum() == 0
    assert layer_with(quantizer, weight, 0.0).lost_groups().flatten().tolist() == [True] + [False] * 7


@pytest.mark.parametrize("value", [0.0, 1e-5, -1e-5, 5e-5, math.inf, math.nan])
def test_a_scale_of_nothing_is_none(value: float) -> None:
    """5e-5 is a denormal float16: its precision is gone."""
    scale = torch.tensor([value, 0.01, -0.01], dtype=torch.float16)
    assert groups_without_scale(scale, 1e-5).tolist() == [True, False, False]
