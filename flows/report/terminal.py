"""The report as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table
from rich.text import Text

from requant.flows.report.console import text_console
from requant.flows.report.report import (
    COMPARISON_COLUMNS,
    RunReport,
    compared_rows,
    gate_rows,
    published_words,
    run_headline,
    stage_rows,
)
from requant.tasks.card.rows import DOMAIN_COLUMNS, domain_rows
from requant.tasks.formatting import gigabytes
from requant.tasks.serving.result import BenchmarkResult, PromptResult
from requant.tasks.validating.document import ValidationDocument
from requant.tasks.validating.measured import DomainValues

RIGHT = {
    "seconds", "measured", "limit", "at once", "tokens/s", "first token", "between, p99", "bytes", "time",
    "cost", "count", "memory", "GPU memory", "low_gpu_mem: memory", "GPU memory there", "size", "smaller", "perplexity",
    "same token", "draft acceptance", "quantized", "kept", "tokens",
}  # fmt: skip
# Columns of the table by domain that fit a terminal, and their short names there.
DOMAINS_IN_TERMINAL = {
    "domain": "domain",
    "tokens": "tokens",
    "over the base's": "perplexity",
    "KL divergence, nats": "KL divergence",
    "same next token": "same next token",
    "ratio to the base's": "draft acceptance ratio",
}

NEXT_STEP = (
    "next        raise quantize.iters, choose a smaller group_size or more bits, or change the limits in gates: a run "
    "with other limits quantizes and measures nothing again"
)


def render(report: RunReport) -> str:
    """Render the report of a run. With outputs, render the report of each, and a comparison at the end."""
    if not report.outputs:
        return _render_one(report)
    console = text_console(130)
    with console.capture() as capture:
        console.print(
            f"\n{report.status.upper()}  {run_headline(report)}", highlight=False, markup=False, soft_wrap=True
        )
        console.print(table_of(COMPARISON_COLUMNS, compared_rows(report)))
    return "".join([*map(_render_one, report.outputs.values()), capture.get()])


def _render_one(report: RunReport) -> str:
    """Render the report of one result: its base, stages and gates, its speed, and where its files are."""
    console = text_console(110)
    with console.capture() as capture:
        console.print(f"\n{report.status.upper()}  {run_headline(report)}", highlight=False, markup=False)
        if report.stages:
            console.print(table_of(("stage", "state", "seconds", "artifact"), stage_rows(report)))
        if report.gates:
            console.print(table_of(("gate", "measured", "limit", "", ""), gate_rows(report.gates)))
        if report.status == "rejected":
            console.print(NEXT_STEP, highlight=False, markup=False)
        if report.measured and report.measured.divergence.domains:
            console.print(_domains(report.measured.divergence.domains))
        if report.benchmark and report.benchmark.engine != "none":
            speed = f"speed       {speed_line(report.benchmark)}"
            console.print(speed, highlight=False, markup=False, soft_wrap=True)
        if report.path:
            console.print(f"checkpoint  {report.path}", highlight=False, markup=False, soft_wrap=True)
        if report.path and report.beside:
            console.print(f"card        {report.path / 'README.md'}", highlight=False, markup=False, soft_wrap=True)
        if report.published:
            where = f"{report.published.url} ({published_words(report.published)})"
            console.print(f"{'Hub':11} {where}", highlight=False, markup=False, soft_wrap=True)
        if report.error:
            console.print(f"error       {report.error}", highlight=False, markup=False, soft_wrap=True)
    return capture.get()


def validation_text(document: ValidationDocument) -> str:
    """Render the gates, and the comparison by domain, as tables."""
    console = text_console(110)
    with console.capture() as capture:
        console.print(table_of(("gate", "measured", "limit", "", ""), gate_rows(document.gates)))
        if document.domains:
            console.print("", _domains(document.domains))
    return capture.get()


def _domains(domains: Mapping[str, DomainValues]) -> Table:
    """Lay out the part of the comparison by domain that fits a terminal, with 95 % intervals in parentheses."""
    places = [DOMAIN_COLUMNS.index(name) for name in DOMAINS_IN_TERMINAL]
    rows = (tuple(row[place] for place in places) for row in domain_rows(domains))
    return table_of(tuple(DOMAINS_IN_TERMINAL.values()), rows)


def bench_text(result: BenchmarkResult, name: str) -> str:
    """Render a benchmark: a row for each prompt, the totals with MTP and without, and the paths of engine logs."""
    console = text_console(110)
    with console.capture() as capture:
        console.print(f"\n{name}  {speed_line(result)}", highlight=False, markup=False, soft_wrap=True)
        header = ("prompt", "sampling", "at once", "MTP", "tokens/s", "first token", "between, p99", "draft acceptance")
        if result.prompts:
            console.print(table_of(header, map(_bench_row, result.prompts)))
        modes = (("MTP off", result.mtp.off), ("MTP on", result.mtp.on)) if result.mtp else ()
        for word, one in modes:
            if one is not None:
                drafted = "" if one.acceptance is None else f", draft acceptance rate {one.acceptance:.1%}"
                line = f"{word:9} {one.tokens_per_second:.1f} tokens/s, greedy, one request at a time{drafted}"
                console.print(line, highlight=False, markup=False)
        if result.mtp and result.mtp.speedup:
            console.print(f"speed-up  {result.mtp.speedup:.2f} times", highlight=False, markup=False)
        if result.peak_gpu_bytes:
            console.print(f"GPU       {gigabytes(result.peak_gpu_bytes)}", highlight=False, markup=False)
        for path in result.logs or ():
            console.print(f"log       {path}", highlight=False, markup=False, soft_wrap=True)
    return capture.get()


def speed_line(benchmark: BenchmarkResult) -> str:
    """Sum up a benchmark in one line."""
    engine = ", ".join(word for word in (benchmark.version, benchmark.hardware) if word)
    if benchmark.tokens_per_second is None:
        return f"not measured ({engine or benchmark.engine})"
    line = f"{benchmark.tokens_per_second:.1f} tokens/s"
    if benchmark.acceptance is not None:
        line += f", draft acceptance rate {benchmark.acceptance:.1%}"
    if benchmark.mtp and benchmark.mtp.speedup is not None:
        line += f", {benchmark.mtp.speedup:.2f} times as fast as without MTP"
    return f"{line} ({engine or benchmark.engine})"


def _bench_row(row: PromptResult) -> tuple[str, ...]:
    gaps = (row.inter_token_seconds.median, row.inter_token_seconds.p99)
    return (
        f"{row.set}/{row.name}",
        row.sampling,
        str(row.concurrency),
        "on" if row.mtp else "off",
        f"{row.tokens_per_second:.1f}",
        f"{row.first_token_seconds * 1000:.0f} ms",
        " ".join("-" if gap is None else f"{gap * 1000:.1f}" for gap in gaps) + " ms",
        "-" if row.acceptance is None else f"{row.acceptance:.1%}",
    )


def table_of(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """Lay out a table without lines. The columns that RIGHT names are aligned to the right."""
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right" if name in RIGHT else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
