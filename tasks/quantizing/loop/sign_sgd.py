"""Sign descent over the parameters of a block's fake-quantized layers, as auto-round 0.16.1 does it."""

from __future__ import annotations

from typing import Any

import torch


def groups_by_rate(quantizer: Any, wrappers: Any) -> list[tuple[float, list[torch.Tensor]]]:
    """Parameters by their step size, as auto-round groups them."""
    groups: dict[float, list[torch.Tensor]] = {}
    for wrapper in wrappers:
        bits = getattr(wrapper.orig_layer, "bits", None)
        lr, minmax_lr = quantizer._config.compute_lr(bits), quantizer._config.compute_minmax_lr(bits)
        for key, parameter in wrapper.params.items():
            edge = "min" in key or "max" in key
            chosen = (quantizer.minmax_lr if minmax_lr is None else minmax_lr) if edge else (
                quantizer.lr if lr is None else lr
            )  # fmt: skip
            groups.setdefault(float(chosen), []).append(parameter)
    return list(groups.items())


def rates(lr: float, iters: int) -> list[float]:
    """The step size of each iteration: auto-round's schedule, torch's LinearLR over a float32 tensor."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": torch.tensor(lr)}], lr=torch.tensor(lr))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=iters)
    found = []
    for _ in range(iters):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


@torch.no_grad()
def update(groups: list[tuple[float, list[torch.Tensor]]], steps: list[float], bounded: list[torch.Tensor]) -> None:
    """One step of sign descent; the scales' coefficients stay in [0, 1], which auto-round sees to before each use."""
    for (_, parameters), step in zip(groups, steps, strict=True):
        moving = [(p, p.grad) for p in parameters if p.grad is not None]
        gradients = [gradient for _, gradient in moving]
        torch._foreach_sign_(gradients)
        torch._foreach_add_([p for p, _ in moving], gradients, alpha=-step)
        for parameter, _ in moving:
            parameter.grad = None
    torch._foreach_clamp_min_(bounded, 0.0)
    torch._foreach_clamp_max_(bounded, 1.0)


@torch.no_grad()
def copied(parameters: list[torch.Tensor], into: list[torch.Tensor], offload: bool) -> list[torch.Tensor]:
    """The parameters as they are now: in `into` if that holds copies already, else in new ones."""
    if not into:
        return [p.detach().to("cpu" if offload else p.device, copy=True) for p in parameters]
    torch._foreach_copy_(into, parameters)
    return into
