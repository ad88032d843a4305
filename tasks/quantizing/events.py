"""What the quantize child says: events.jsonl, one JSON object a line, read by the process that started it."""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOSS = re.compile(r"loss iter 0: ([\d.e+-]+|nan|inf) -> iter (\d+): ([\d.e+-]+|nan|inf)")


class Refused(ValueError):
    """The job cannot work as it is; the message is a sentence for the user."""


class Events:
    """Appends to events.jsonl; every line is whole when its newline is there."""

    def __init__(self, path: Path) -> None:
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        self._stream = path.open("a", buffering=1)
        if cut:  # by a kill in the middle of a line
            self._stream.write("\n")
        self._started = time.monotonic()

    def __call__(self, event: str, **fields: Any) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        self._stream.write(json.dumps({"event": event, "seconds": seconds, **fields}) + "\n")


class LogEvents(logging.Handler):
    """Turns auto-round's log into events: the loss of each block, and every warning."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self.events = events

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if match := LOSS.search(text):
            self.events("loss", before=float(match[1]), after=float(match[3]), iteration=int(match[2]))
        elif record.levelno >= logging.WARNING:
            self.events("warning", text=text[:500])


def report_blocks(events: Events, seed: int | None = None, on_end: Callable[[], None] = lambda: None) -> None:
    """Turn auto-round's progress bar into events: `block` when one starts, `progress` when one ends.

    With `seed`, each block draws its samples from a seed of its own: in auto-round a block's order depends on all that
    were tuned before it in the same process, so that a resumed run ends with another result.
    """
    from auto_round.compressors import orchestrator

    class Bar(orchestrator.tqdm):  # type: ignore[misc]
        def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
            super().set_description(desc, refresh)
            if desc and desc.startswith("Quantizing ") and desc != "Quantizing done":
                if seed is not None:
                    random.seed(f"{seed} {desc}")
                events("block", name=desc.removeprefix("Quantizing "), index=self.n, total=self.total)

        def update(self, n: float | None = 1) -> bool | None:
            displayed: bool | None = super().update(n)
            on_end()
            events("progress", done=self.n, total=self.total, peak_gpu_bytes=_peak())
            return displayed

    orchestrator.tqdm = Bar


def report_output(events: Events) -> None:
    """Tell of each block how far its output moved: `output` with the mean squared error over all samples.

    auto-round's loss is the lowest of single batches, so that it says as much of the batch as of the block.
    """
    import torch
    from auto_round.algorithms.composer import AlgorithmComposer
    from auto_round.utils.device_manager import device_manager

    original = AlgorithmComposer.compress_block

    def compress_block(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantized, reference = original(self, *args, **kwargs)
        if isinstance(quantized, list) and isinstance(reference, list):
            began = time.monotonic()
            device = torch.device(device_manager.device)
            total = torch.zeros((), device=device)
            for one, other in zip(quantized, reference, strict=True):
                total += (one.to(device).float() - other.to(device).float()).square().mean()
            error = float(total) / len(reference)
            events("output", error=float(f"{error:.6g}"), spent=round(time.monotonic() - began, 3))
        return quantized, reference

    AlgorithmComposer.compress_block = compress_block


def kind_of(error: Exception) -> str:
    """`oom` and `compile` can be cured by other settings, `failed` cannot."""
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or re.search(r"out of memory|allocate memory|_ALLOC_FAILED", text, re.IGNORECASE):
        return "oom"
    if "torch._dynamo" in text or "torch._inductor" in text or "triton" in text.lower():
        return "compile"
    return "failed"


def _peak() -> int | None:
    """The most GPU memory that was in use at once, in bytes."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
