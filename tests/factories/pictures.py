"""Records to draw, and names that want to be more than text."""

from __future__ import annotations

from typing import Any

HOSTILE = (
    "</text><script>alert(1)</script>", '"/><image href="x" onload="alert(1)"/>', "$x^{2}$ $", "\\frac{", "a\nb\tc",
    "\0\x1b[31m", "\u202egnp", "名前 🦉", "&lt;b&gt;", "]]>", "x" * 500, "", "\ud800",
)  # fmt: skip


def prompt(name: str, *, mtp: bool, speed: float = 50.0, **more: Any) -> dict[str, Any]:
    accepted = {"acceptance": 0.8, "acceptance_by_position": [0.9, 0.7]} if mtp else {"acceptance": None}
    return {
        "set": "card", "name": name, "mtp": mtp, "sampling": "greedy", "concurrency": 1, "tokens": 64,
        "tokens_per_second": speed, **accepted, **more,
    }  # fmt: skip
