"""What was measured of a result beside its base, as rows of tables: for the card and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant.tasks.formatting import named, plain

QUALITY = ("", "base", "quantized", "95 % of the time between")
HEAD = ("draft", "base", "quantized", "base, on its own text", "quantized, on its own text")
TASKS = ("task", "metric", "base", "quantized", "recovery")
Row = tuple[str, ...]


def quality_rows(measured: Mapping[str, Any]) -> list[Row]:
    """What was measured of both, side by side, with the interval of ours where there is one. Headed QUALITY."""
    rows = [
        ("perplexity", "base_perplexity", "perplexity", "perplexity_interval", "{:.4f}"),
        ("perplexity over the base's, minus 1", "", "perplexity_increase", "perplexity_increase_interval", "{:.2%}"),
        ("KL divergence, nats", "", "kl_divergence", "", "{:.4f}"),
        ("KL divergence, 99 % of places below", "", "kl_divergence_p99", "", "{:.4f}"),
        ("same next token", "", "top1_agreement", "", "{:.2%}"),
        ("first draft accepted", "base_mtp_acceptance", "mtp_acceptance", "", "{:.1%}"),
    ]
    return [
        (name, *(told(measured.get(key), form) for key in (base, ours)), _interval(measured.get(between), form))
        for name, base, ours, between, form in rows
        if measured.get(ours) is not None
    ]


def head_rows(measured: Mapping[str, Any]) -> list[Row]:
    """Share of steps that take each draft and all before it: on the pinned text, and decoding greedily. Headed HEAD."""
    kinds = ("base_mtp", "mtp", "base_greedy", "greedy")
    columns = [measured.get(f"{kind}_acceptance_by_position") or [] for kind in kinds]
    count = max(map(len, columns))
    return [
        (str(place + 1), *(told(column[place] if place < len(column) else None, "{:.1%}") for column in columns))
        for place in range(count)
    ]


def task_rows(measured: Mapping[str, Any]) -> list[Row]:
    """The lm-eval tasks of validate's values. Headed TASKS."""
    return [
        (
            named(name),
            plain(task["metric"]),
            f"{task['base']:.4g}",
            f"{task['ours']:.4g}",
            "none" if task["recovery"] is None else f"{task['recovery']:.1%}",
        )
        for name, task in (measured.get("tasks") or {}).items()
    ]


def told(value: Any, form: str) -> str:
    """A value as `form` has it; nothing for None."""
    return "" if value is None else form.format(value)


def _interval(values: Any, form: str) -> str:
    return " and ".join(form.format(value) for value in values or [])
