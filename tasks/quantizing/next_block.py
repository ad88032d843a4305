"""Load the weights of the next block onto the GPU in a thread, while a block is tuned.

The weights lie in mapped files. Copying a block of 27 B dimensions takes 0.2 seconds if its pages are in memory, and
longer if the disk has to read them.
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
            quantize_blocks(orchestrator, model, inputs, names, *args, **kwargs)

        return quantize_known

    def starting(self, dispatch_block: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `SignRoundQuantizer.dispatch_block` to use what was loaded, and to load the block after this one.

        auto-round collects garbage five times per block, which takes 0.4 seconds each time at 64 layers: it looks at
        the modules of the model and at what was compiled. All of that stays, so it is exempt from here on.
        """

        @functools.wraps(dispatch_block)
        def dispatch_and_load(quantizer: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
            gc.collect()
            gc.freeze()
            self._use(block)
            block = dispatch_block(quantizer, block, *args, **kwargs)
            following = self._following.get(getattr(block, "global_name", ""))
            if self._device is not None and following is not None:
                self._loaded = self._thread.submit(_load, self._model.get_submodule(following), self._device)
            return block

        return dispatch_and_load

    def _use(self, block: Any) -> None:
        """Give the block the weights that were loaded for it. Without them, it is loaded now."""
        future, self._loaded = self._loaded, None
        if future is None or future.exception() is not None:
            return
        loaded = future.result()
        for name, parameter in block.named_parameters():
            if name in loaded and parameter.data_ptr() == loaded[name].original.data_ptr():
                parameter.data = loaded[name].copy


def _load(block: Any, device: torch.device) -> dict[str, _Loaded]:
    """Copy the weights of a block to the device, beside what it computes. Experts that are still fused stay out."""
    weights = {name: parameter.data for name, parameter in block.named_parameters() if parameter.device.type == "cpu"}
    copies = {name: torch.empty_like(weight, device=device) for name, weight in weights.items()}
    with beside_computing(device):
        for name, weight in weights.items():
            copies[name].copy_(weight)
    return {name: _Loaded(weight, copies[name]) for name, weight in weights.items()}
