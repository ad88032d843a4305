"""The quantized weights of a block as one matrix with a row for each group, of which each process tunes a part.

A step quantizes and dequantizes each weight once, and the block computes with the dequantized weights as with any
others. Their gradients, of the whole batch, then pass through the quantization to its parameters. Where several
processes tune the block, each has the parameters of its part of the groups: the gradients of the dequantized weights
are added up over the processes and divided among them, and the dequantized groups of all parts are gathered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from requant.tasks.quantizing.loop.best_iteration import groups_without_scale
from requant.tasks.quantizing.loop.ranks import Ranks

SCALES = ("min_scale", "max_scale")
PARAMETERS = ("value", *SCALES)
FakeQuantize = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class DequantizedLinear(nn.Module):
    """A linear layer with dequantized weights, `[out, in]`, or more columns where groups are padded.

    It holds only tensors and numbers. So layers of one shape share a compiled graph.
    """

    def __init__(self, weight: torch.Tensor, columns: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.columns = nn.Parameter(weight), columns
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.weight.shape[1] == self.columns else self.weight[:, : self.columns]
        return functional.linear(x, weight, self.bias)


@dataclass(frozen=True)
class QuantizationKind:
    """What layers must have in common to be quantized as one matrix: auto-round's function and its arguments.

    `width` is the number of weights of a group, and `parameters` the names of what is tuned.
    """

    quantizer: Callable[..., tuple[torch.Tensor, torch.Tensor, Any]]
    data_type: str
    bits: int
    group_size: int
    width: int
    scale_dtype: torch.dtype
    threshold: float
    dtype: torch.dtype
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, wrapper: Any) -> QuantizationKind:
        """Read the kind from auto-round's wrapper of a layer."""
        layer = wrapper.orig_layer
        return cls(
            quantizer=wrapper.weight_quant_func,
            data_type=wrapper.data_type,
            bits=layer.bits,
            group_size=layer.group_size,
            width=int(_groups_of(layer).shape[1]),
            scale_dtype=layer.scale_dtype,
            threshold=wrapper.q_scale_thresh,
            dtype=layer.weight.dtype,
            parameters=tuple(wrapper.params),
        )


def fake_quantize(
    kind: QuantizationKind, weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, tuned: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize and dequantize groups `[n, width]` with auto-round's function, and return them and their scales.

    `low` and `high`, `[n]`, are the ends of each group's values. `tuned` has the rounding values `value`, `[n, width]`,
    and `min_scale` and `max_scale`, `[n]`.
    """
    dequantized, scale, _ = kind.quantizer(
        weight,
        bits=kind.bits,
        group_size=kind.group_size,
        v=tuned.get("value", 0),
        min_scale=tuned.get("min_scale", 1.0),
        max_scale=tuned.get("max_scale", 1.0),
        scale_dtype=kind.scale_dtype,
        tensor_min=low,
        tensor_max=high,
        data_type=kind.data_type,
        q_scale_thresh=kind.threshold,
    )
    return dequantized.to(kind.dtype), scale


class FlatWeights:
    """The weights of the layers of one kind. `modules` are to stand in the block in place of these layers.

    `params` are what is tuned, by name, of this process's groups alone; `bits` decides their learning rate.
    """

    def __init__(self, kind: QuantizationKind, wrappers: Mapping[str, Any], ranks: Ranks) -> None:
        self.kind, self.bits, self._ranks = kind, kind.bits, ranks
        grouped = {name: _groups_of(wrapper.orig_layer) for name, wrapper in wrappers.items()}
        self._counts = {name: len(groups) for name, groups in grouped.items()}
        total = sum(self._counts.values())
        self._share = -(-total // ranks.count)
        self._begin = min(ranks.rank * self._share, total)
        self._end = min(self._begin + self._share, total)
        whole = torch.cat([*grouped.values()])
        self._weight = whole if ranks.count == 1 else whole[self._begin : self._end].clone()
        self._low, self._high = (
            torch.cat([getattr(wrapper, name) for wrapper in wrappers.values()])[self._begin : self._end]
            for name in ("weight_min", "weight_max")
        )
        self.params = {name: self._take_parameter(wrappers.values(), name) for name in kind.parameters}
        self._dequantized = torch.zeros(self._share * ranks.count, kind.width, dtype=whole.dtype, device=whole.device)
        self._gradients = torch.zeros_like(self._dequantized)
        self._own_gradients = torch.empty_like(self._gradients[: self._share]) if ranks.count > 1 else self._gradients
        self._own: torch.Tensor | None = None  # the dequantized groups of this process, with their graph
        self.modules: dict[str, DequantizedLinear] = {}
        at = 0
        for name, wrapper in wrappers.items():
            layer, end = wrapper.orig_layer, at + self._counts[name]
            rows, columns = layer.weight.shape
            bias = None if layer.bias is None else layer.bias.detach()
            module = DequantizedLinear(self._dequantized[at:end].view(rows, -1), columns, bias)
            module.weight.grad = self._gradients[at:end].view(rows, -1)
            if ranks.count == 1 and module.weight.shape[1] == columns:
                layer.weight.data = self._weight[at:end].view(rows, columns)  # which saves the memory of a copy
            self.modules[name], at = module, end

    def _take_parameter(self, wrappers: Iterable[Any], name: str) -> nn.Parameter:
        """Return the parameters of this name of this process's groups, and free those of auto-round's wrappers."""
        taken = [wrapper.params[name] for wrapper in wrappers]
        whole = torch.cat([one.detach() for one in taken])
        for one in taken:
            one.data = one.data.new_empty(0)
        return nn.Parameter(whole if self._ranks.count == 1 else whole[self._begin : self._end].clone())

    def dequantize(self, quantize: FakeQuantize, saving: AbstractContextManager[Any]) -> None:
        """Compute the weights of `modules` from the parameters. `quantize` is `fake_quantize`, compiled or not."""
        with saving:
            self._own, _ = quantize(self.kind, self._weight, self._low, self._high, self.params)
        with torch.no_grad():
            own = self._own.detach()
            if missing := self._share - len(own):
                own = functional.pad(own, (0, 0, 0, missing))
            self._ranks.gather(own, self._dequantized)

    def backward(self, *, more: bool) -> None:
        """Pass the gradients of the dequantized weights, of all processes, on to the parameters of this one.

        With `more`, further gradients will follow before the next `dequantize`.
        """
        assert self._own is not None
        gradients = self._ranks.sum_of_part(self._gradients, self._own_gradients)[: len(self._own)]
        torch.autograd.backward(self._own, gradients, retain_graph=more)
        self._gradients.zero_()
        if not more:
            self._own = None

    @torch.no_grad()
    def lost_groups(self) -> torch.Tensor:
        """Return a mask of the groups, of all processes, that have no scale now (`groups_without_scale`)."""
        _, scale = fake_quantize(self.kind, self._weight, self._low, self._high, self.params)
        return self._whole(groups_without_scale(scale, self.kind.threshold).flatten())

    def by_layer(self, params: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Gather the parameters of all processes, and return them by layer and name."""
        whole = {name: self._whole(own) for name, own in params.items()}
        ends = dict(zip(self._counts, torch.tensor([*self._counts.values()]).cumsum(0).tolist(), strict=True))
        return {
            layer: {name: values[end - self._counts[layer] : end] for name, values in whole.items()}
            for layer, end in ends.items()
        }

    def _whole(self, own: torch.Tensor) -> torch.Tensor:
        """Gather what the processes have of each group, `[n, ...]`, for all groups."""
        if self._ranks.count == 1:
            return own
        part = torch.zeros(self._share, *own.shape[1:], dtype=own.dtype, device=self._dequantized.device)
        part[: len(own)] = own
        whole = part.new_empty(self._share * self._ranks.count, *own.shape[1:])
        self._ranks.gather(part, whole)
        return whole[: sum(self._counts.values())]


def flat_weights(wrappers: Mapping[str, Any], ranks: Ranks) -> list[FlatWeights]:
    """Put the weights of a block's layers, in auto-round's wrappers, into one matrix for each kind of quantization."""
    kinds: dict[QuantizationKind, dict[str, Any]] = defaultdict(dict)
    for name, wrapper in wrappers.items():
        kinds[QuantizationKind.of(wrapper)][name] = wrapper
    return [FlatWeights(kind, layers, ranks) for kind, layers in kinds.items() if kind.parameters]


def _groups_of(layer: Any) -> torch.Tensor:
    """Return the weights of a layer as `[groups, width]`, padded with zeros as auto-round does."""
    from auto_round.data_type.utils import reshape_pad_tensor_by_group_size

    groups: torch.Tensor = reshape_pad_tensor_by_group_size(layer.weight.detach(), layer.group_size)[0]
    return groups


def parameters_of(flats: Sequence[FlatWeights], names: Collection[str] = PARAMETERS) -> list[torch.Tensor]:
    """List the parameters of these names of this process."""
    return [parameter for flat in flats for name, parameter in flat.params.items() if name in names]
