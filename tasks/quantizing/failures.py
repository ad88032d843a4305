"""How quantizing can fail, classified by what helps. `memory_fallback.py` acts on the kinds of failure."""

from __future__ import annotations

import re
from enum import StrEnum


class FailureKind(StrEnum):
    """The kinds of failure. Their values are part of events.jsonl, ladder.json, and the record of the stage."""

    GPU_MEMORY = "oom"
    HOST_MEMORY = "host oom"
    COMPILE = "compile"  # It may work without torch.compile.
    REFUSED = "refused"  # The job cannot work as it is (JobRefused).
    FAILED = "failed"  # No other settings help.


OUT_OF_MEMORY = frozenset({FailureKind.GPU_MEMORY, FailureKind.HOST_MEMORY})


def classify(error: Exception) -> FailureKind:
    """Classify an exception of auto-round, torch or Python by its class and its message."""
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return FailureKind.HOST_MEMORY
    # GPU libraries say "out of memory" or, as cuBLAS does, "ALLOC_FAILED". torch's CPU allocator says "can't allocate
    # memory" in a RuntimeError, and the operating system "Cannot allocate memory".
    if re.search(r"out of memory|_ALLOC_FAILED", text, re.IGNORECASE):
        return FailureKind.GPU_MEMORY
    if re.search(r"allocate memory", text, re.IGNORECASE):
        return FailureKind.HOST_MEMORY
    if "torch._dynamo" in text or "torch._inductor" in text or "triton" in text.lower():
        return FailureKind.COMPILE
    return FailureKind.FAILED
