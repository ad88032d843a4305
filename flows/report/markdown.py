"""The report for a person who reads markdown: a file beside the JSON document, and an artifact in Prefect's UI."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

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
from requant.tasks.card.rows import DRAFT_COLUMNS, QUALITY_COLUMNS, TASKS, head_rows, quality_rows, task_rows
from requant.tasks.plots import Picture
from requant.tasks.validating.gates import slope_error

WORST = 5  # blocks and matrices
Row = tuple[str, ...]


def markdown(report: RunReport, link: Callable[[Picture], str]) -> str:
    """The whole report; `link` says where a picture is to be found."""
    parts = [f"## {report.status}: {run_headline(report)}"]
    if report.error:
        parts.append(report.error)
    if report.published:
        parts.append(f"[{report.published['repo_id']}]({report.published['url']}): {published_words(report.published)}")
    if report.stages:
        parts.append(table(("stage", "state", "seconds", "artifact"), stage_rows(report)))
    if report.gates:
        parts += ["### Gates", table(("gate", "measured", "limit", "", "note"), gate_rows(report.gates))]
    if rows := quality_rows(report.measured or {}):
        parts += ["### Quality", table(QUALITY_COLUMNS, rows)]
    if rows := head_rows(report.measured or {}):
        parts += ["### Drafts taken", table(DRAFT_COLUMNS, rows)]
    if rows := task_rows(report.measured or {}):
        parts += ["### Tasks", table(TASKS, rows)]
    if rows := worst_rows(report.measured or {}):
        parts += ["### Worst layers", table(("", "error", "slope", "bits"), rows)]
    if report.benchmark and report.benchmark.get("engine") != "none":
        parts += ["### Speed", *_speed(report.benchmark)]
    if report.pictures:
        parts.append("### Pictures")
    for picture in report.pictures:
        parts.append(f"![{escape(picture.caption)}]({link(picture)})\n\n{escape(picture.caption)}")
    return "\n\n".join(parts) + "\n"


def comparison(report: RunReport) -> str:
    """Several outputs side by side: what stands before the report of each."""
    parts = [f"## {report.status}: {run_headline(report)}", verdict(report)]
    if report.outputs:
        parts.append(table(COMPARISON_COLUMNS, compared_rows(report)))
    return "\n\n".join(parts) + "\n"


def worst_rows(measured: Mapping[str, Any]) -> list[Row]:
    """The blocks with the largest error, and the matrices whose slope is farthest from where rounding would put it."""
    blocks = sorted(measured.get("blocks") or [], key=lambda block: -_size(block["error"]))
    matrices = sorted(measured.get("matrices") or [], key=lambda matrix: -_size(slope_error(matrix)))
    return [
        *(
            (Markdown(f"block {b['block']}, {named(b['kind'])}"), number(b["error"], ".2%"), "", "")
            for b in blocks[:WORST]
        ),
        *(
            (named(m["name"]), number(m["error"], ".2%"), number(m["slope"], ".4f"), str(m["bits"]))
            for m in matrices[:WORST]
        ),
    ]


def _speed(benchmark: Mapping[str, Any]) -> list[str]:
    """The medians of each setting, and each prompt of the first."""
    from requant.tasks.plots.prompts import first_setting

    where = escape(
        f"{benchmark['version']} on {benchmark['hardware']}" if "version" in benchmark else "a server that ran already"
    )
    prompts = [p for p in benchmark.get("prompts") or [] if "mtp" in p and "sampling" in p]
    if not prompts:
        said = f"{benchmark['prefill_tokens_per_second']:.0f} tokens per second of prompt"
        return [f"{where}: {said}, {benchmark['tokens_per_second']:.1f} decoded."]
    head = ("tokens/s", "first token, s", "between tokens, ms: median", "99 %", "drafts accepted")
    settings: dict[tuple[str, int, bool], list[Mapping[str, Any]]] = {}
    for p in prompts:
        settings.setdefault((str(p["sampling"]), int(p["concurrency"]), bool(p["mtp"])), []).append(p)
    by_setting = [
        (escape(sampling), str(requests), "on" if mtp else "off", *_figures(found))
        for (sampling, requests, mtp), found in sorted(settings.items())
    ]
    words, first = first_setting(prompts)
    by_prompt = [
        (Markdown(f"{named(p['set'])} {named(p['name'])}"), "on" if p["mtp"] else "off", *_figures([p])) for p in first
    ]
    return [
        f"{where}; medians over the prompts:",
        table(("sampling", "requests at once", "MTP", *head), by_setting),
        f"Each prompt, {escape(words)}:",
        table(("prompt", "MTP", *head), by_prompt),
    ]


def _figures(prompts: list[Mapping[str, Any]]) -> Row:
    """The medians over some prompts."""
    between = [p.get("inter_token_seconds") or {} for p in prompts]
    return (
        _median([p.get("tokens_per_second") for p in prompts], "{:.1f}"),
        _median([p.get("first_token_seconds") for p in prompts], "{:.3f}"),
        *(_median([1000 * b[key] for b in between if b.get(key) is not None], "{:.1f}") for key in ("median", "p99")),
        _median([p.get("acceptance") for p in prompts], "{:.1%}"),
    )


def _median(values: list[Any], form: str) -> str:
    numbers = [value for value in values if value is not None]
    return form.format(statistics.median(numbers)) if numbers else ""


def _size(value: Any) -> float:
    """A value to sort by; what is no number is larger than any."""
    return value if isinstance(value, int | float) and value == value else float("inf")
