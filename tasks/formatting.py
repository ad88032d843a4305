"""Format sizes and durations for people."""

from __future__ import annotations


def gigabytes(size_bytes: int) -> str:
    """Format bytes with two decimals: GB of 10^9, MB and kB below."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes / 1e3:.1f} kB"


def format_duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
