"""The advice to run `requant mtp-fix`, with which sentences about a checkpoint end."""

from __future__ import annotations

import re

FIX = "run requant mtp-fix"
FIX_INDEX = f"{FIX}, which writes the index"
FROM_BASE = f"{FIX} --base"
_ADVICE = re.compile(r"[:;,] (?:run|restore it with) requant mtp-fix(?:, which writes the index| --base)?")


def without_advice(sentence: str) -> str:
    """Return a sentence without the advice to run mtp-fix, for those who cannot follow it or have."""
    return _ADVICE.sub("", sentence)
