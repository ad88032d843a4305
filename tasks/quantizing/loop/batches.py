"""Batches of a block's samples on the device, fetched one ahead, and losses that are read without waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Loss:
    """A loss that is copied to pinned memory as soon as it is known, so that reading it does not stop the GPU."""

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
        """Return the loss, as soon as it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


def split(indices: list[int], size: int) -> list[list[int]]:
    """Split indices into pieces of this size. The last piece can be smaller."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


class Batch(NamedTuple):
    """Some samples on the device: `b` of them, of `s` tokens each.

    arguments    the keyword arguments of the block's forward pass
    target       the output that the block should have, `[b, s, hidden]`
    mask         1 for each token that counts, `[b, s, 1]` int64; None if all count
    """

    arguments: dict[str, object]
    target: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Fetched:
    indices: list[int]
    batch: Batch
    copied: Any  # the CUDA event that is recorded when the copies are done


class BlockInputs:
    """The inputs, arguments, targets and masks of a block's samples, of which `get` returns batches on the device.

    `select` is auto-round's BlockForwardRunner: it knows which of the other arguments have one value per sample.
    """

    def __init__(
        self, select: Any, inputs: list[torch.Tensor], others: dict[str, object], targets: list[torch.Tensor],
        masks: list[torch.Tensor] | None, device: torch.device,
    ) -> None:  # fmt: skip
        self._select, self._inputs, self._targets, self._masks = select, inputs, targets, masks
        self._others, self._device = others, device
        self._stream: Any = None
        self._ahead: _Fetched | None = None
        if device.type == "cuda" and inputs[0].device.type == "cpu":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._inputs, self._targets = ([tensor.pin_memory() for tensor in ts] for ts in (inputs, targets))

    def get(self, indices: list[int]) -> Batch:
        """Return the batch of these samples, which is ready if `fetch` was called for it last."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.indices != indices:
            return self._gather(indices)
        torch.cuda.current_stream(self._device).wait_event(ahead.copied)
        for tensor in _cuda_tensors(ahead.batch):
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return ahead.batch

    def fetch(self, indices: list[int]) -> None:
        """Start to copy these samples to the device, unless all samples are there."""
        if self._stream is None or not indices:
            return
        with torch.cuda.stream(self._stream):
            batch = self._gather(indices)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        self._ahead = _Fetched(indices, batch, copied)

    def _gather(self, indices: list[int]) -> Batch:
        _, others = self._select._select_batch({}, self._others, torch.tensor(indices))
        others.pop("positional_inputs", None)
        mask = None
        if self._masks:
            mask = torch.cat([self._masks[i] for i in indices]).to(self._device).unsqueeze(-1)
        arguments = {**_to_device(others, self._device), "hidden_states": self._stack(self._inputs, indices)}
        return Batch(arguments, self._stack(self._targets, indices), mask)

    def _stack(self, tensors: list[torch.Tensor], indices: list[int]) -> torch.Tensor:
        if tensors[0].device == self._device or self._device.type != "cuda":
            return torch.cat([tensors[i] for i in indices]).to(self._device)
        shape = (len(indices), *tensors[0].shape[1:])
        stacked = torch.empty(shape, dtype=tensors[0].dtype, device=self._device)
        for row, i in enumerate(indices):
            stacked[row].copy_(tensors[i][0], non_blocking=True)
        return stacked


def _to_device(value: Any, device: torch.device) -> Any:
    """Move all tensors in nested lists, tuples and dicts to the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (list, tuple)):
        return type(value)(_to_device(v, device) for v in value)
    return {k: _to_device(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def _cuda_tensors(value: Any) -> list[torch.Tensor]:
    """List all tensors on a GPU in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value] if value.device.type == "cuda" else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for v in values for tensor in _cuda_tensors(v)]
