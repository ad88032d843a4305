"""The report as Markdown: a file next to the JSON document, and an artifact in Prefect's UI."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from requant.flows.report.report import (
    COMPARISON_COLUMNS,
    RunReport,
    compared_rows,
    gate_rows,
    published_words,
    run_headline,
    stage_rows,
    verdict,
)
from requant.tasks.card.filters import Markdown, escape, named, number, table
from requant.tasks.card.probes import probe_tables
from requant.tasks.card.rows import (
    DOMAIN_COLUMNS,
    DRAFT_COLUMNS,
    EXPERT_COLUMNS,
    QUALITY_COLUMNS,
    TASK_COLUMNS,
    domain_rows,
    expert_rows,
    head_rows,
    quality_rows,
    task_rows,
)
from requant.tasks.plots import Picture
from requant.tasks.serving.result import BenchmarkResult, PromptResult
from requant.tasks.validating.gates import slope_error
from requant.tasks.validating.measured import Measured

WORST_ROWS = 5  # of blocks, and of matrices
Row = tuple[str, ...]


def markdown(report: RunReport, link: Callable[[Picture], str]) -> str:
    """Render the report of one result. `link` returns the address of a picture."""
    parts = [f"## {report.status}: {run_headline(report)}"]
    if report.error:
        parts.append(report.error)
    if report.published:
        parts.append(f"[{report.published.repo_id}]({report.published.url}): {published_words(report.published)}")
    if report.stages:
        parts.append(table(("stage", "state", "seconds", "artifact"), stage_rows(report)))
    if report.gates:
        parts += ["### Gates", table(("gate", "measured", "limit", "", "note"), gate_rows(report.gates))]
    measured = report.measured or Measured()
    if rows := quality_rows(measured):
        parts += ["### Quality", table(QUALITY_COLUMNS, rows)]
    if rows := domain_rows(measured.divergence.domains):
        parts += ["### Quality by domain", table(DOMAIN_COLUMNS, rows)]
    if rows := head_rows(measured):
        parts += ["### Draft acceptance rate", table(DRAFT_COLUMNS, rows)]
    if rows := task_rows(measured):
        parts += ["### Tasks", table(TASK_COLUMNS, rows)]
    if report.probes:
        parts += ["### Probes", *(table(columns, rows) for columns, rows in probe_tables(report.probes))]
    if rows := worst_rows(measured):
        parts += ["### Worst layers", table(("", "error", "slope", "bits"), rows)]
    if rows := expert_rows(report.experts):
        parts += ["### Experts", "Tokens of the calibration that they got:", table(EXPERT_COLUMNS, rows)]
    if report.benchmark and report.benchmark.engine != "none":
        parts += ["### Speed", *_speed(report.benchmark)]
    if report.pictures:
        parts.append("### Pictures")
    for picture in report.pictures:
        parts.append(f"![{escape(picture.caption)}]({link(picture)})\n\n{escape(picture.caption)}")
    return "\n\n".join(parts) + "\n"


def comparison(report: RunReport) -> str:
    """Render the report of a run with outputs: its verdict, and a table that compares the outputs."""
    parts = [f"## {report.status}: {run_headline(report)}", verdict(report)]
    if report.outputs:
        parts.append(table(COMPARISON_COLUMNS, compared_rows(report)))
    return "\n\n".join(parts) + "\n"


def worst_rows(measured: Measured) -> list[Row]:
    """List the blocks with the largest errors, and the matrices whose slopes are farthest from those of a rounding."""
    blocks = sorted(measured.divergence.blocks or (), key=lambda block: -_nan_as_infinity(block.error))
    matrices = sorted(measured.matrices or (), key=lambda matrix: -_nan_as_infinity(slope_error(matrix)))
    return [
        *(
            (Markdown(f"block {block.block}, {named(block.kind)}"), number(block.error, ".2%"), "", "")
            for block in blocks[:WORST_ROWS]
        ),
        *(
            (named(matrix.name), number(matrix.error, ".2%"), number(matrix.slope, ".4f"), str(matrix.bits))
            for matrix in matrices[:WORST_ROWS]
        ),
    ]


def _speed(benchmark: BenchmarkResult) -> list[str]:
    """Render the medians of each setting, and a row for each prompt of the first setting."""
    from requant.tasks.plots.prompts import first_setting

    where = escape(f"{benchmark.version} on {benchmark.hardware}" if benchmark.version else "a server that ran already")
    prompts = benchmark.prompts
    if not prompts:
        prefill = f"{number(benchmark.prefill_tokens_per_second, '.0f')} tokens per second of prompt"
        return [f"{where}: {prefill}, {number(benchmark.tokens_per_second, '.1f')} decoded."]
    head = ("tokens/s", "first token, s", "between tokens, ms: median", "99 %", "draft acceptance rate")
    settings: dict[tuple[str, int, bool], list[PromptResult]] = {}
    for p in prompts:
        settings.setdefault((p.sampling, p.concurrency, p.mtp), []).append(p)
    by_setting = [
        (escape(sampling), str(requests), "on" if mtp else "off", *_medians(rows))
        for (sampling, requests, mtp), rows in sorted(settings.items())
    ]
    words, first = first_setting(prompts)
    by_prompt = [(Markdown(f"{named(p.set)} {named(p.name)}"), "on" if p.mtp else "off", *_medians([p])) for p in first]
    return [
        f"{where}; medians over the prompts:",
        table(("sampling", "requests at once", "MTP", *head), by_setting),
        f"Each prompt, {escape(words)}:",
        table(("prompt", "MTP", *head), by_prompt),
    ]


def _medians(prompts: Sequence[PromptResult]) -> Row:
    """Return the medians over some prompts, as the last five cells of a row."""
    gaps = [p.inter_token_seconds for p in prompts]
    return (
        _median([p.tokens_per_second for p in prompts], ".1f"),
        _median([p.first_token_seconds for p in prompts], ".3f"),
        _median([gap.median * 1000 for gap in gaps if gap.median is not None], ".1f"),
        _median([gap.p99 * 1000 for gap in gaps if gap.p99 is not None], ".1f"),
        _median([p.acceptance for p in prompts if p.acceptance is not None], ".1%"),
    )


def _median(values: Sequence[float], form: str) -> str:
    return number(statistics.median(values), form) if values else ""


def _nan_as_infinity(value: float) -> float:
    """Return a value to sort by: NaN counts as larger than any number."""
    return math.inf if math.isnan(value) else value
