"""Sign descent on the parameters of a block's fake-quantized layers, as in auto-round 0.16.1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch


class ParameterGroup(NamedTuple):
    """Parameters with one learning rate, which is that of the first iteration."""

    learning_rate: float
    parameters: list[torch.Tensor]


class Tuned(Protocol):
    """Parameters by name, and the bits on which their learning rate depends."""

    bits: int
    params: dict[str, torch.nn.Parameter]


def group_parameters(quantizer: Any, tuned: Iterable[Tuned]) -> list[ParameterGroup]:
    """Group parameters by their learning rate."""
    groups: dict[float, list[torch.Tensor]] = {}
    for one in tuned:
        lr, minmax_lr = quantizer._config.compute_lr(one.bits), quantizer._config.compute_minmax_lr(one.bits)
        lr = quantizer.lr if lr is None else lr
        minmax_lr = quantizer.minmax_lr if minmax_lr is None else minmax_lr
        for key, parameter in one.params.items():
            is_scale = "min" in key or "max" in key
            groups.setdefault(float(minmax_lr if is_scale else lr), []).append(parameter)
    return [ParameterGroup(*group) for group in groups.items()]


def step_sizes(lr: float, iters: int) -> list[float]:
    """Return the step size of each iteration: auto-round's schedule, torch's LinearLR on a float32 tensor."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": torch.tensor(lr)}], lr=torch.tensor(lr))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=iters)
    sizes = []
    for _ in range(iters):
        sizes.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return sizes


@torch.no_grad()
def take_step(groups: list[ParameterGroup], sizes: list[float], bounded: list[torch.Tensor]) -> None:
    """Move the parameters of each group by its step size against the signs of their gradients, and clear these.

    The `bounded` parameters, the scales' coefficients, are clamped to [0, 1]. auto-round does that before each use.
    """
    for group, size in zip(groups, sizes, strict=True):
        moving = [(p, p.grad) for p in group.parameters if p.grad is not None]
        gradients = [gradient for _, gradient in moving]
        torch._foreach_sign_(gradients)
        torch._foreach_add_([p for p, _ in moving], gradients, alpha=-size)
        for parameter, _ in moving:
            parameter.grad = None
    torch._foreach_clamp_min_(bounded, 0.0)
    torch._foreach_clamp_max_(bounded, 1.0)


@torch.no_grad()
def copy_parameters(parameters: list[torch.Tensor], into: list[torch.Tensor], offload: bool) -> list[torch.Tensor]:
    """Copy the parameters into the earlier copies `into`, or into new tensors if that is empty; return the copies.

    With `offload`, new copies are in the CPU's memory.
    """
    if not into:
        return [p.detach().to("cpu" if offload else p.device, copy=True) for p in parameters]
    torch._foreach_copy_(into, parameters)
    return into
