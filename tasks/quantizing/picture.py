"""A picture of each block's loss before and after tuning: SVG, drawn by hand, so that no plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 900, 320, 70, 30, 40
BEFORE, AFTER = "#9aa4b2", "#2563eb"


def losses_svg(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Two points a block (before, after) on a logarithmic scale, joined by a line; blocks without losses have none."""
    told = [
        (number, float(block["loss_before"]), float(block["loss_after"]))
        for number, block in enumerate(blocks, 1)
        if all(_drawable(block.get(name)) for name in ("loss_before", "loss_after"))
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18">Loss of each block: <tspan fill="{BEFORE}">before</tspan> and '
        f'<tspan fill="{AFTER}">after</tspan> tuning</text>',
    ]
    if told:
        values = [value for _, *pair in told for value in pair]
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        high = max(high, low + 1)

        def y(value: float) -> float:
            share = (math.log10(value) - low) / (high - low)
            return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

        for power in range(low, high + 1):
            at = y(10.0**power)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{at}" y2="{at}" stroke="#e5e7eb"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">1e{power}</text>')
        step = (WIDTH - LEFT - 30) / max(len(blocks), 1)
        every = max(1, len(blocks) // 16)
        for number, before, after in told:
            x = round(LEFT + (number - 0.5) * step, 1)
            parts.append(f'<line x1="{x}" x2="{x}" y1="{y(before)}" y2="{y(after)}" stroke="{BEFORE}"/>')
            parts.append(f'<circle cx="{x}" cy="{y(before)}" r="3" fill="{BEFORE}"/>')
            parts.append(f'<circle cx="{x}" cy="{y(after)}" r="3" fill="{AFTER}"/>')
            if (number - 1) % every == 0:
                parts.append(f'<text x="{x}" y="{HEIGHT - 20}" text-anchor="middle">{number}</text>')
    return "".join([*parts, "</svg>"])


def _drawable(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0
