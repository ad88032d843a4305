"""The delta rule in matrix products: equal to transformers' reference, value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from requant.tasks.quantizing.auto_round import TuningRun, patched, tuning_patches
from requant.tasks.quantizing.auto_settings import LoopSettings
from requant.tasks.quantizing.loop.gated_delta_rule import (
    chunk_gated_delta_rule,
    modules_with_reference,
    unit_lower_inverse,
)

REFERENCE = modeling_qwen3_5.torch_chunk_gated_delta_rule
LOOP = LoopSettings(torch_compile=False, offload=False, compare_last=False)


def inputs(shape: tuple[int, int, int, int, int], alike: bool = False) -> dict[str, torch.Tensor]:
    """(batch, tokens, key heads, value heads, dim); `alike`: keys all but equal, almost no decay."""
    b, s, hk, hv, d = shape
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    key = torch.ones(b, s, hk, d) + 0.01 * draw(b, s, hk, d) if alike else draw(b, s, hk, d)
    given = {"query": draw(b, s, hk, d), "key": key, "value": draw(b, s, hv, d)}
    given |= {"g": -draw(b, s, hv).abs() * (0.001 if alike else 1.0), "beta": draw(b, s, hv).sigmoid()}
    return {name: value.requires_grad_() for name, value in given.items()}


def run(rule: Any, given: dict[str, torch.Tensor], autocast: bool = False) -> list[torch.Tensor]:
    """The output, and the gradient by each input of a fixed function of it. Only the forward pass is autocast."""
    for value in given.values():
        value.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output, state = rule(**given, use_qk_l2norm_in_kernel=True)
    assert state is None
    weights = torch.sin(torch.arange(output.numel()).float()).view_as(output)
    torch.autograd.backward((output * weights).sum())
    return [output.detach(), *(value.grad.clone() for value in given.values() if value.grad is not None)]


@pytest.mark.parametrize("shape", [(2, 130, 2, 4, 32), (1, 256, 2, 2, 16), (2, 64, 1, 3, 8), (1, 7, 1, 1, 4)])
@pytest.mark.parametrize("alike", [False, True])
def test_value_and_gradients_are_the_references(shape: tuple[int, int, int, int, int], alike: bool) -> None:
    given = inputs(shape, alike)
    ours, theirs = run(chunk_gated_delta_rule, given), run(REFERENCE, given)
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm()) <= 2e-5 * float(other.norm()) + 1e-6


def test_the_inverse_does_not_lose_what_powers_of_the_matrix_would() -> None:
    """Equal keys: the matrix is all ones, its powers grow to 1e17, its inverse holds ones and zeros."""
    lower = torch.ones(3, 64, 64).tril(-1)
    expected = torch.eye(64) - torch.diag(torch.ones(63), -1)
    assert torch.equal(unit_lower_inverse(lower), expected.expand(3, 64, 64))


@pytest.mark.parametrize("decay", [1.0, 0.05])
def test_in_bfloat16_value_and_gradients_are_as_close_to_the_truth_as_the_references(decay: float) -> None:
    """Noise in a gradient is noise in its sign, which is all that tuning uses."""
    given = inputs((2, 320, 2, 4, 64))
    given["g"] = (given["g"].detach() * decay).requires_grad_()
    truth = run(REFERENCE, given)
    ours, theirs = run(chunk_gated_delta_rule, given, autocast=True), run(REFERENCE, given, autocast=True)
    for one, other, true in zip(ours, theirs, truth, strict=True):
        assert float((one - true).norm()) <= 1.01 * float((other - true).norm())


def test_it_is_put_where_a_models_layers_are_defined() -> None:
    norm = modeling_qwen3_5.Qwen3_5RMSNorm(4)
    modules = modules_with_reference(torch.nn.Sequential(norm))
    assert [module.__name__ for module in modules] == ["transformers.models.qwen3_5.modeling_qwen3_5"]
    run = TuningRun(lambda event: None, 0, LOOP, modules)
    with patched(tuning_patches(run), run.report):
        assert modeling_qwen3_5.torch_chunk_gated_delta_rule is chunk_gated_delta_rule
    assert modules_with_reference(torch.nn.Linear(2, 2)) == []
