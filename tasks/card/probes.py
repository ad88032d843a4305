"""The tables of probes, which the card and a run's report have."""

from __future__ import annotations

from requant.tasks.card.filters import named, number
from requant.tasks.probing.compare import ProbeSummary

PROBE_COLUMNS = ("probe", "questions", "base", "quantized", "loss", "95 % interval")
REASON_COLUMNS = ("what is wrong", "in", "base", "quantized")
LENGTH_COLUMNS = ("tokens of text", "values", "base found", "quantized found")
NAMES = {
    "tool_calls_valid": "tool calls that can be made",
    "tool_calls_right": "the right tool calls",
    "answers_finished": "answers that end",
    "answers_without_loop": "answers without a loop",
    "retrieval": "values found in long texts",
}
Row = tuple[str, ...]


def probe_tables(summary: ProbeSummary) -> list[tuple[Row, list[Row]]]:
    """Return the columns and rows of each table that has rows."""
    tables: list[tuple[Row, list[Row]]] = [
        (PROBE_COLUMNS, comparison_rows(summary)),
        (REASON_COLUMNS, reason_rows(summary)),
        (LENGTH_COLUMNS, length_rows(summary)),
    ]
    return [(columns, rows) for columns, rows in tables if rows]


def comparison_rows(summary: ProbeSummary) -> list[Row]:
    """Compare the shares of good answers of both."""
    return [
        (
            NAMES[one.measure],
            str(one.questions),
            number(one.base, ".1%") or "not measured",
            number(one.ours, ".1%") or "not measured",
            number(one.loss, ".1%"),
            " to ".join(number(end, ".1%") for end in one.loss_interval or ()),
        )
        for one in summary.comparisons
    ]


def reason_rows(summary: ProbeSummary) -> list[Row]:
    return [(named(one.reason), named(one.set), str(one.base), str(one.ours)) for one in summary.reasons]


def length_rows(summary: ProbeSummary) -> list[Row]:
    return [(f"{one.length:,}", str(one.questions), str(one.base), str(one.ours)) for one in summary.lengths]
