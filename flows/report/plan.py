"""A plan for a person: a table in a terminal, markdown for a pull request and for Prefect's UI."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from requant.flows.report.terminal import table_of
from requant.tasks.card.filters import escape, named, table
from requant.tasks.formatting import gigabytes
from requant.tasks.pipeline.prefect import duration
from requant.tasks.planning.document import BaseChanges, Needs, OutputLayout, Plan, PlanDocument, PlannedOutput

Row = tuple[str, ...]
STAGES = ("stage", "state", "bytes", "time", "cost", "figure from")
NEEDS = ("stage", "disk", "memory", "GPU memory", "low_gpu_mem: memory", "GPU memory there")
TENSORS = ("tensors", "count", "", "why")
OUTPUTS = ("output", "repo", "bytes", "scheme and packing", "packed", "kept")


def subject(document: PlanDocument) -> str:
    """Name the base and its commit."""
    base = document.base
    return f"{base.repo_id}@{base.sha[:7] if base.sha else base.revision}"


def plan_headline(document: PlanDocument) -> str:
    """Say in one line what would be made of the base."""
    base, output = document.base, document.output
    if base.bytes is None or output.bytes is None:
        return "nothing can be made of it"
    sizes = f"{gigabytes(base.bytes)} become {gigabytes(output.bytes)}"
    if not isinstance(output, OutputLayout):
        return f"{sizes} in {len(document.outputs or ())} outputs"
    counts = f"{output.quantized_tensors} matrices packed, {output.kept_tensors} tensors kept"
    return f"{sizes}, {_scheme(output)}: {counts}"


def _scheme(output: OutputLayout) -> str:
    scheme = output.scheme
    group = "whole rows" if scheme.group_size == -1 else f"group {scheme.group_size}"
    return f"W{scheme.bits}A16, {group}, {output.packing}"


def render(document: PlanDocument) -> str:
    """Lay the plan out for a terminal."""
    console = Console(width=160 if document.outputs else 130, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(
            f"\n{subject(document)}: {plan_headline(document)}\n", highlight=False, markup=False, soft_wrap=True
        )
        if document.stages:
            console.print(table_of(stage_header(document), stage_rows(document)), "")
            console.print(table_of(NEEDS, need_rows(document)), "")
            if document.outputs:
                console.print(table_of(OUTPUTS, output_rows(document.outputs)), "")
            else:
                console.print(table_of(TENSORS, tensor_rows(document)), "")
        for word, sentence in sentences(document):
            console.print(f"{word:12} {sentence}", highlight=False, markup=False, soft_wrap=True)
    return capture.get()


def markdown(document: PlanDocument, title: str) -> str:
    """Write the plan as markdown. Names and sentences come from outside: nothing in them is more than text."""
    verdict = "would be stopped" if document.problems else "would run"
    parts = [f"### {escape(title)}: {verdict}", f"{_verbatim(subject(document))}: {escape(plan_headline(document))}"]
    if document.stages:
        parts.append(table(stage_header(document), stage_rows(document)))
        parts.append(table(NEEDS, need_rows(document)))
        if document.outputs:
            parts.append(table(OUTPUTS, output_rows(document.outputs)))
        plans: Sequence[Plan] = document.outputs or [document]
        for one in plans:
            rows = [(named(row[0]), *row[1:]) for row in tensor_rows(one)]
            summary = f"tensors of {one.name}" if isinstance(one, PlannedOutput) else "tensors"
            parts.append(f"<details><summary>{summary}</summary>\n\n{table(TENSORS, rows)}\n\n</details>")
    parts.append("\n".join(f"- {word}: {_verbatim(sentence)}" for word, sentence in sentences(document)))
    return "\n\n".join(parts) + "\n"


def _verbatim(sentence: str) -> str:
    """Write a sentence as code, which nothing in it can leave."""
    return "`" + "".join(c if c.isprintable() and c != "`" else " " for c in sentence) + "`"


def stage_header(document: PlanDocument) -> Row:
    return ("output", *STAGES) if document.outputs else STAGES


def stage_rows(document: PlanDocument) -> list[Row]:
    """List the stages, and under them what all take together."""
    several = bool(document.outputs)
    rows = [
        (
            *([stage.output or ""] if several else []),
            stage.name,
            stage.state,
            gigabytes(stage.bytes) if stage.state == "run" else "",
            duration(stage.seconds) if stage.state == "run" else "",
            "" if stage.cost is None else f"{stage.cost:.2f}",
            stage.figure,
        )
        for stage in document.stages
    ]
    whole = document.hardware
    cost = "" if whole.cost is None else f"{whole.cost:.2f}"
    on = f"on {whole.gpu}" if whole.gpu else ""
    return [*rows, ("all", *([""] if several else []), "", "", duration(whole.seconds), cost, on)]


def need_rows(document: PlanDocument) -> list[Row]:
    """List what each stage takes of disk and memory."""
    stages = document.needs.stages if isinstance(document.needs, Needs) else {}
    rows: list[Row] = []
    for name, need in stages.items():
        sizes = (need.disk_bytes, need.ram_bytes, need.vram_bytes, need.low_ram_bytes, need.low_vram_bytes)
        rows.append((name, *("" if size is None else gigabytes(size) for size in sizes)))
    return rows


def output_rows(outputs: Sequence[PlannedOutput]) -> list[Row]:
    """List what each output comes to; one that cannot be made has no figures."""
    rows: list[Row] = []
    for one in outputs:
        output, figures = one.output, ("", "", "", "")
        if isinstance(output, OutputLayout):
            counts = str(output.quantized_tensors), str(output.kept_tensors)
            figures = (gigabytes(output.bytes), _scheme(output), *counts)
        rows.append((one.name, one.repo_id or "", *figures))
    return rows


def tensor_rows(plan: Plan) -> list[Row]:
    """List the packed modules and the tensors that are kept, in groups; none of a result that cannot be made."""
    output = plan.output
    if not isinstance(output, OutputLayout):
        return []
    return [
        *((group.modules, str(group.count), group.storage, gigabytes(group.bytes)) for group in output.quantized),
        *((kept.tensors, str(kept.count), "kept", kept.why) for kept in output.kept),
    ]


def sentences(document: PlanDocument) -> list[tuple[str, str]]:
    """Say what no table holds, each with the word that it stands under."""
    found: list[tuple[str, str]] = []
    needs, transfer = document.needs, document.transfer
    if isinstance(needs, Needs):
        moved = f"{gigabytes(transfer.download_bytes)} down, {gigabytes(transfer.upload_bytes)} up"
        found.append(("moves", f"{moved}; {gigabytes(needs.disk_bytes)} of disk below the store"))
    for engine, verdict in document.engines.items():
        loads = "loads" if verdict.loads else "does not load"
        drafts = "drafts" if verdict.mtp else "does not draft"
        found.append((engine, f"{loads}, {drafts}: {verdict.reason}"))
    found += [("changed", line) for line in _changes(document.changes)]
    found += [("note", note) for note in document.notes]
    return found + ([("problem", problem) for problem in document.problems] or [("problems", "none")])


def _changes(changes: BaseChanges | None) -> list[str]:
    if changes is None:
        return []
    files, tensors = changes.files, changes.tensors
    counts = f"{len(files.added)} added, {len(files.removed)} removed, {len(files.changed)} changed"
    lines = [f"files since {changes.since[:7]}: {counts}"]
    if tensors is not None:
        words = f"{len(tensors.added)} added, {len(tensors.removed)} removed, {len(tensors.retyped)} retyped"
        lines.append(f"tensors: {words}, {tensors.in_changed_shards} in shards that changed")
    return lines + [f"config.json: {c.field} was {c.before}, is {c.now}" for c in changes.config]
