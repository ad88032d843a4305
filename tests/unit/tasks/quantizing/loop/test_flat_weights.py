"""The weights of a block as one matrix of groups give what each layer gives by itself."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from auto_round.wrapper import WrapperLinear
from torch import nn

from requant.tasks.quantizing.loop.flat_weights import fake_quantize, flat_weights, parameters_of
from requant.tasks.quantizing.loop.ranks import ALONE


def layer(inputs: int, outputs: int, *, bits: int = 4, group_size: int = 32, sym: bool = True, seed: int = 0) -> Any:
    made: Any = nn.Linear(inputs, outputs, bias=seed % 2 == 0)
    made.weight.data = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05
    for name, value in {
        "bits": bits, "group_size": group_size, "sym": sym, "scale_dtype": torch.float16, "act_bits": 16,
        "data_type": "int_sym" if sym else "int_asym",
    }.items():  # fmt: skip
        setattr(made, name, value)
    return made


def wrapped(layers: dict[str, Any]) -> dict[str, Any]:
    return {name: WrapperLinear(one, enable_torch_compile=False) for name, one in layers.items()}


LAYERS = {
    "of one kind": [{}, {"seed": 1}, {"seed": 2}],
    "of several bits": [{}, {"bits": 8}, {"bits": 2, "seed": 1}],
    "asymmetric": [{"sym": False}, {"seed": 1, "sym": False}],
    "whole rows": [{"group_size": -1}, {"group_size": -1, "seed": 1}],
    "uneven rows": [{"group_size": 48}, {"group_size": 48, "seed": 1}],
}


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_gradients_and_parameters_are_those_of_each_layer_alone(kind: str) -> None:
    layers = {f"layer {i}": layer(64, 8 + 8 * i, **settings) for i, settings in enumerate(LAYERS[kind])}
    alone = wrapped(copy.deepcopy(layers))
    flats = flat_weights(wrapped(layers), ALONE)
    assert len(flats) == len({one["bits"] for one in LAYERS[kind] if "bits" in one}) + any(
        "bits" not in one for one in LAYERS[kind]
    )
    random = torch.Generator().manual_seed(3)
    for parameter in parameters_of(flats, ["value"]):
        parameter.data = torch.rand(parameter.shape, generator=random) - 0.5
    values = [flat.by_layer({"value": flat.params["value"].detach()}) for flat in flats]
    for flat in flats:
        flat.dequantize(fake_quantize, nullcontext())
    modules = {name: module for flat in flats for name, module in flat.modules.items()}
    x = torch.randn(5, 64, generator=random)
    for name, wrapper in alone.items():
        wrapper.value.data = next(one[name]["value"] for one in values if name in one)
        expected, found = wrapper(x), modules[name](x)
        assert torch.equal(found, expected)
        expected.square().sum().backward()
        found.square().sum().backward()
    for flat in flats:
        flat.backward(more=False)
        for key, parameter in flat.params.items():
            for name, gradient in flat.by_layer({key: parameter.grad}).items():  # type: ignore[dict-item]
                assert torch.equal(gradient[key], alone[name].params[key].grad), (name, key)


def test_gradients_of_several_pieces_add_up() -> None:
    layers = {"layer": layer(64, 8)}
    (flat,) = flat_weights(wrapped(layers), ALONE)
    flat.dequantize(fake_quantize, nullcontext())
    gradients = []
    for more in (True, False):
        flat.modules["layer"](torch.ones(1, 64)).sum().backward()
        flat.backward(more=more)
        assert flat.params["value"].grad is not None
        gradients.append(flat.params["value"].grad.clone())
    assert torch.equal(gradients[1], 2 * gradients[0]) and gradients[0].abs().sum() > 0
    assert flat.modules["layer"].weight.grad is not None and not flat.modules["layer"].weight.grad.any()
