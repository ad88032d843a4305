"""A report for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.report import Report, gate_rows, headline, stage_rows
from tasks.gates import Gate


def render(report: Report) -> str:
    """What was made from what, how long each stage took, the gates, and where everything is."""
    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(f"\n{report.status.upper()}  {headline(report)}", highlight=False, markup=False)
        if report.stages:
            console.print(_table(("stage", "state", "seconds", "artifact"), stage_rows(report)))
        if report.gates:
            console.print(_table(("gate", "measured", "limit", "", ""), gate_rows(report.gates)))
        if report.benchmark and report.benchmark["engine"] != "none":
            speed = report.benchmark
            console.print(
                f"speed       {speed['prefill_tokens_per_second']:.0f} tokens/s prompt, "
                f"{speed['tokens_per_second']:.1f} decoded ({speed['engine']})",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        if report.path:
            console.print(f"checkpoint  {report.path}", highlight=False, markup=False, soft_wrap=True)
        if report.path and report.card:
            console.print(f"card        {report.path / 'README.md'}", highlight=False, markup=False, soft_wrap=True)
        if report.published:
            done = "published" if report.published["changed"] else "already published"
            where = f"{report.published['url']} ({done}, tag {report.published['tag']})"
            console.print(f"{'Hub':11} {where}", highlight=False, markup=False, soft_wrap=True)
        if report.error:
            console.print(f"error       {report.error}", highlight=False, markup=False, soft_wrap=True)
    return capture.get()


def gate_table(gates: Iterable[Gate]) -> str:
    """The gates alone."""
    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(_table(("gate", "measured", "limit", "", ""), gate_rows(gates)))
    return capture.get()


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in header:
        made.add_column(name, justify="right" if name in {"seconds", "measured", "limit"} else "left")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
