"""Sizes as people write them."""

from __future__ import annotations


def gigabytes(size_bytes: int) -> str:
    """Format bytes with two decimals: GB of 10^9, MB and kB below."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes / 1e3:.1f} kB"
