"""Batches of a block's samples on the device, one ahead; and losses that nobody waits for."""

from __future__ import annotations

from typing import Any

import torch


class Loss:
    """A loss that is read while the GPU goes on: copied to pinned memory as soon as it is known."""

    def __init__(self, loss: torch.Tensor) -> None:
        self._event: Any = None
        value = loss.detach()
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._value = value.clone()

    def read(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


def cut(order: list[int], batch: int) -> list[list[int]]:
    """Samples in pieces of `batch`, the last one may be smaller."""
    return [order[start : start + batch] for start in range(0, len(order), batch)]


class BlockInputs:
    """Batches of a block's inputs, arguments, targets and masks on the device, fetched one ahead where they are not.

    `select` is auto-round's BlockForwardRunner, which knows which arguments are per sample.
    """

    def __init__(
        self, select: Any, inputs: list[torch.Tensor], others: dict[str, Any], targets: list[torch.Tensor],
        masks: list[torch.Tensor] | None, device: torch.device,
    ) -> None:  # fmt: skip
        self._select, self._inputs, self._targets, self._masks = select, inputs, targets, masks
        self._others, self._device = others, device
        self._stream: Any = None
        self._ahead: tuple[list[int], Any, Any] | None = None
        if device.type == "cuda" and inputs[0].device.type == "cpu":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._inputs, self._targets = ([tensor.pin_memory() for tensor in ts] for ts in (inputs, targets))

    def get(self, indices: list[int]) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]:
        """(the block's keyword arguments, target, mask) of these samples."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != indices:
            return self._gather(indices)
        torch.cuda.current_stream(self._device).wait_event(ahead[2])
        for tensor in _tensors(ahead[1]):
            tensor.record_stream(torch.cuda.current_stream(self._device))
        gathered: tuple[dict[str, Any], torch.Tensor, torch.Tensor | None] = ahead[1]
        return gathered

    def fetch(self, indices: list[int]) -> None:
        """Begin to copy these samples, if they are not on the device."""
        if self._stream is None or not indices:
            return
        with torch.cuda.stream(self._stream):
            gathered = self._gather(indices)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._ahead = (indices, gathered, event)

    def _gather(self, indices: list[int]) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]:
        _, others = self._select._select_batch({}, self._others, torch.tensor(indices))
        others.pop("positional_inputs", None)
        mask = None
        if self._masks:
            mask = torch.cat([self._masks[i] for i in indices]).to(self._device).unsqueeze(-1)
        arguments = {**_moved(others, self._device), "hidden_states": self._stacked(self._inputs, indices)}
        return arguments, self._stacked(self._targets, indices), mask

    def _stacked(self, tensors: list[torch.Tensor], indices: list[int]) -> torch.Tensor:
        if tensors[0].device == self._device or self._device.type != "cuda":
            return torch.cat([tensors[i] for i in indices]).to(self._device)
        shape = (len(indices), *tensors[0].shape[1:])
        target = torch.empty(shape, dtype=tensors[0].dtype, device=self._device)
        for row, i in enumerate(indices):
            target[row].copy_(tensors[i][0], non_blocking=True)
        return target


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(v, device) for v in value)
    return {k: _moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.device.type == "cuda" else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for v in values for tensor in _tensors(v)]
