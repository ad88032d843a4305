"""Start each block with free memory and with its weights on the GPU: a thread loads them while a block is tuned.

The weights lie in mapped files. Copying a block of 27 B dimensions takes 0.2 seconds if its pages are in memory, and
longer if the disk has to read them. Collecting garbage takes 0.4 seconds in a model of 64 layers, as it looks at all
modules and at what was compiled, and auto-round 0.16.1 does it five times per block.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from requant.tasks.quantizing.finished_blocks import beside_computing


class _Loaded(NamedTuple):
    """A weight in the model's memory, and its copy on the device."""

    original: torch.Tensor
    copy: torch.Tensor


class NextBlock:
    """The block that is loaded ahead. Its methods make replacements for auto-round's functions.

    `device`: where to load it; None to load nothing ahead.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._model: Any = None
        self._following: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1, "next block")
        self._loaded: Future[dict[str, _Loaded]] | None = None

    def knowing_names(self, quantize_blocks: Callable[..., None]) -> Callable[..., None]:
        """Wrap `CompressionOrchestrator._quantize_blocks` to learn which block follows which."""

        @functools.wraps(quantize_blocks)
        def quantize_known(orchestrator: Any, model: Any, inputs: Any, names: Any, *args: Any, **kwargs: Any) -> None:
            self._model, self._following = model, dict(pairwise(names))
            try:
                quantize_blocks(orchestrator, model, inputs, names, *args, **kwargs)
            finally:
                self._model = None

        return quantize_known

    def starting(self, dispatch_block: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `SignRoundQuantizer.dispatch_block` to use what was loaded, and to load the block after this one.

        It also clears the memory. What is there then stays, so that later collections of garbage need not look at it.
        """
        from auto_round.utils import clear_memory
        from auto_round.utils.device_manager import device_manager

        @functools.wraps(dispatch_block)
        def dispatch_and_load(quantizer: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
            clear_memory()
            gc.freeze()
            self._use(block)
            block = dispatch_block(quantizer, block, *args, **kwargs)
            if torch.device(device_manager.device).type == "cpu":
                _own_weights(block)
            following = self._following.get(getattr(block, "global_name", ""))
            if self._device is not None and following is not None:
                self._loaded = self._thread.submit(_load, self._model.get_submodule(following), self._device)
            return block

        return dispatch_and_load

    def sparing(self, clear_memory: Callable[..., None]) -> Callable[..., None]:
        """Wrap `clear_memory` to do no more than to drop the tensors of a list while the blocks of a model are tuned.

        Without a full collection each time, they are freed too. torch keeps what they took on a GPU for the next ones,
        and gives it back by itself where it would not get more.
        """

        def drop(tensors: Any = None, device_list: Any = None) -> None:
            if self._model is None:
                clear_memory(tensors, device_list=device_list)
            elif isinstance(tensors, list):
                tensors[:] = [None] * len(tensors)

        return drop

    def _use(self, block: Any) -> None:
        """Give the block the weights that were loaded for it. Without them, it is loaded now."""
        future, self._loaded = self._loaded, None
        if future is None or future.exception() is not None:
            return
        loaded = future.result()
        for name, parameter in block.named_parameters():
            if name in loaded and parameter.data_ptr() == loaded[name].original.data_ptr():
                parameter.data = loaded[name].copy


def _own_weights(block: Any) -> None:
    """Give a block on the CPU weights of its own, which tuning changes.

    A changed page of a mapped file takes memory until the whole file is closed, which is at the end of the model.
    """
    for parameter in block.parameters():
        parameter.data = parameter.data.clone()


def _load(block: Any, device: torch.device) -> dict[str, _Loaded]:
    """Copy the weights of a block to the device, beside what it computes. Experts that are still fused stay out."""
    weights = {name: parameter.data for name, parameter in block.named_parameters() if parameter.device.type == "cpu"}
    copies = {name: torch.empty_like(weight, device=device) for name, weight in weights.items()}
    with beside_computing(device):
        for name, weight in weights.items():
            copies[name].copy_(weight)
    return {name: _Loaded(weight, copies[name]) for name, weight in weights.items()}
