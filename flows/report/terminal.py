"""A report for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from requant.flows.report.report import (
    COMPARISON_COLUMNS,
    RunReport,
    compared_rows,
    gate_rows,
    published_words,
    run_headline,
    stage_rows,
)
from requant.tasks.formatting import gigabytes
from requant.tasks.validating.gates import Gate

RIGHT = {
    "seconds", "measured", "limit", "at once", "tokens/s", "first token", "between, p99", "accepted", "bytes", "time",
    "cost", "count", "memory", "GPU memory", "low_gpu_mem: memory", "GPU memory there", "size", "smaller", "perplexity",
    "same token", "drafts taken", "packed", "kept",
}  # fmt: skip


def render(report: RunReport) -> str:
    """A run: what came of each output, and at the end how they compare."""
    if not report.outputs:
        return _render(report)
    console = Console(width=130, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(
            f"\n{report.status.upper()}  {run_headline(report)}", highlight=False, markup=False, soft_wrap=True
        )
        console.print(table_of(COMPARISON_COLUMNS, compared_rows(report)))
    return "".join([*map(_render, report.outputs.values()), capture.get()])


def _render(report: RunReport) -> str:
    """What was made from what, how long each stage took, the gates, and where everything is."""
    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(f"\n{report.status.upper()}  {run_headline(report)}", highlight=False, markup=False)
        if report.stages:
            console.print(table_of(("stage", "state", "seconds", "artifact"), stage_rows(report)))
        if report.gates:
            console.print(table_of(("gate", "measured", "limit", "", ""), gate_rows(report.gates)))
        if report.benchmark and report.benchmark["engine"] != "none":
            speed = f"speed       {speed_line(report.benchmark)}"
            console.print(speed, highlight=False, markup=False, soft_wrap=True)
        if report.path:
            console.print(f"checkpoint  {report.path}", highlight=False, markup=False, soft_wrap=True)
        if report.path and report.beside:
            console.print(f"card        {report.path / 'README.md'}", highlight=False, markup=False, soft_wrap=True)
        if report.published:
            where = f"{report.published['url']} ({published_words(report.published)})"
            console.print(f"{'Hub':11} {where}", highlight=False, markup=False, soft_wrap=True)
        if report.error:
            console.print(f"error       {report.error}", highlight=False, markup=False, soft_wrap=True)
    return capture.get()


def gate_table(gates: Iterable[Gate]) -> str:
    """The gates alone."""
    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(table_of(("gate", "measured", "limit", "", ""), gate_rows(gates)))
    return capture.get()


def bench_text(document: Mapping[str, Any], name: str) -> str:
    """A benchmark: a row for each prompt, what they come to, and where the engine's log is."""
    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(f"\n{name}  {speed_line(document)}", highlight=False, markup=False, soft_wrap=True)
        header = ("prompt", "sampling", "at once", "MTP", "tokens/s", "first token", "between, p99", "accepted")
        console.print(table_of(header, map(_bench_row, document["prompts"])))
        for key, word in (("off", "MTP off"), ("on", "MTP on")):
            if one := document.get("mtp", {}).get(key):
                drafted = "" if one["acceptance"] is None else f", {one['acceptance']:.1%} of drafts accepted"
                line = f"{word:9} {one['tokens_per_second']:.1f} tokens/s, greedy, one request at a time{drafted}"
                console.print(line, highlight=False, markup=False)
        if speedup := document.get("mtp", {}).get("speedup"):
            console.print(f"speed-up  {speedup:.2f} times", highlight=False, markup=False)
        if peak := document.get("peak_gpu_bytes"):
            console.print(f"GPU       {gigabytes(peak)}", highlight=False, markup=False)
        for path in document.get("logs", ()):
            console.print(f"log       {path}", highlight=False, markup=False, soft_wrap=True)
    return capture.get()


def speed_line(benchmark: Mapping[str, Any]) -> str:
    """A benchmark in one line."""
    engine = ", ".join(str(benchmark[key]) for key in ("version", "hardware") if key in benchmark)
    line = f"{benchmark['tokens_per_second']:.1f} tokens/s"
    if benchmark["acceptance"] is not None:
        line += f", {benchmark['acceptance']:.1%} of drafts accepted"
    speedup = benchmark.get("mtp", {}).get("speedup")
    if speedup is not None:
        line += f", {speedup:.2f} times as fast as without MTP"
    return f"{line} ({engine or benchmark['engine']})"


def _bench_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    gaps = row["inter_token_seconds"]
    return (
        f"{row['set']}/{row['name']}",
        row["sampling"],
        str(row["concurrency"]),
        "on" if row["mtp"] else "off",
        f"{row['tokens_per_second']:.1f}",
        f"{row['first_token_seconds'] * 1000:.0f} ms",
        " ".join("-" if gaps[key] is None else f"{gaps[key] * 1000:.1f}" for key in ("median", "p99")) + " ms",
        "-" if row["acceptance"] is None else f"{row['acceptance']:.1%}",
    )


def table_of(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """A table without lines."""
    made = Table(box=None, pad_edge=False)
    for name in header:
        made.add_column(name, justify="right" if name in RIGHT else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
