"""Turn auto-round's progress bar, the output of its blocks, and its log into events.

auto-round 0.16.1 offers no other way: it has no callback for a block.
"""

from __future__ import annotations

import functools
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any

from requant.tasks.quantizing.events import (
    BlockDone,
    BlockLoss,
    BlockOutput,
    BlockStarted,
    EventSink,
    ExpertsCounted,
    Warned,
)
from requant.tasks.quantizing.loop.ranks import Ranks

LOSS = re.compile(r"loss iter 0: ([\d.e+-]+|nan|inf) -> iter (\d+): ([\d.e+-]+|nan|inf)")
WARNING_CHARACTERS = 500


class LogReader(logging.Handler):
    """Turns auto-round's log into events: the loss of each block that auto-round's loop tuned, and all warnings."""

    def __init__(self, report: EventSink) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Report a record with a loss, and any other record from level WARNING on."""
        text = record.getMessage()
        if match := LOSS.search(text):
            self._report(BlockLoss(before=float(match[1]), after=float(match[3]), iteration=int(match[2])))
        elif record.levelno >= logging.WARNING:
            self._report(Warned(text=text[:WARNING_CHARACTERS]))


def reporting_bar(bar: type[Any], report: EventSink, seed: int, end_block: Callable[[], None]) -> type[Any]:
    """Derive a class from auto-round's progress bar that reports when a block starts and when it ends.

    When a block starts, it also seeds `random` with `seed` and the name of the block: auto-round draws the block's
    samples from it. When a block ends, it calls `end_block`.
    """

    class Bar(bar):  # type: ignore[misc]
        def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
            super().set_description(desc, refresh)
            if desc and desc.startswith("Quantizing ") and desc != "Quantizing done":
                random.seed(f"{seed} {desc}")
                name = desc.removeprefix("Quantizing ")
                report(BlockStarted(name=name, index=self.n, total=self.total))

        def update(self, n: float | None = 1) -> bool | None:
            displayed: bool | None = super().update(n)
            end_block()
            report(BlockDone(done=self.n, total=self.total, peak_gpu_bytes=_peak_gpu_bytes()))
            return displayed

    return Bar


def reporting_output(compress_block: Callable[..., Any], report: EventSink) -> Callable[..., Any]:
    """Wrap `AlgorithmComposer.compress_block` to report the mean squared error of a block's output over all samples."""
    import torch
    from auto_round.utils.device_manager import device_manager

    @functools.wraps(compress_block)
    def compress_and_report(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantized, reference = compress_block(self, *args, **kwargs)
        if isinstance(quantized, list) and isinstance(reference, list):
            started = time.monotonic()
            device = torch.device(device_manager.device)
            total = torch.zeros((), device=device)
            for output, target in zip(quantized, reference, strict=True):
                total += (output.to(device).float() - target.to(device).float()).square().mean()
            error = float(total) / len(reference)
            report(BlockOutput(error=float(f"{error:.6g}"), spent=round(time.monotonic() - started, 3)))
        return quantized, reference

    return compress_and_report


def reporting_experts(forward: Callable[..., Any], report: EventSink, ranks: Ranks) -> Callable[..., Any]:
    """Wrap `BlockForwardRunner.forward` to report how many tokens of the samples each expert of a block gets.

    The first pass of all samples through a block is that of the base's own states through its own weights.
    """
    from requant.tasks.expert_counts import counting_experts

    counted_blocks = set[str]()

    @functools.wraps(forward)
    def count(self: Any, block: Any, inputs: Any, input_others: Any, indices: Any = None, *args: Any, **kw: Any) -> Any:
        name = getattr(block, "global_name", None)
        if indices is not None or name is None or name in counted_blocks:
            return forward(self, block, inputs, input_others, indices, *args, **kw)
        counted_blocks.add(name)
        with counting_experts(block) as counted:
            output = forward(self, block, inputs, input_others, indices, *args, **kw)
        if counted:
            totals = {module: ranks.sum(tokens).tolist() for module, tokens in counted.items()}
            report(ExpertsCounted(block=name, tokens=totals))
        return output

    return count


def _peak_gpu_bytes() -> int | None:
    """Return the most bytes of GPU memory that torch has had in use at once; None without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
