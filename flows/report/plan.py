"""Show a plan as text in a terminal, and as Markdown in a pull request and in Prefect's UI."""

from __future__ import annotations

from collections.abc import Sequence

from requant.flows.report.console import text_console
from requant.flows.report.terminal import table_of
from requant.tasks.card.filters import escape, named, table
from requant.tasks.formatting import format_duration, gigabytes
from requant.tasks.planning.document import (
    BaseChanges,
    Needs,
    OutputLayout,
    Plan,
    PlanDocument,
    PlannedOutput,
    PlannedSource,
    PlannedStage,
)

Row = tuple[str, ...]
STAGE_COLUMNS = ("stage", "state", "bytes", "time", "cost", "figure from")
NEED_COLUMNS = ("stage", "disk", "memory", "GPU memory", "low_gpu_mem: memory", "GPU memory there")
TENSOR_COLUMNS = ("tensors", "count", "", "why")
OUTPUT_COLUMNS = ("output", "repo", "bytes", "scheme and packing", "quantized", "kept")


def subject(document: PlanDocument, *, whole_path: bool = True) -> str:
    """Return the base and its commit, and those of its adapter. A base in a folder has its path, or its name alone."""
    base = document.base
    adapter, _, commit = (base.adapter or "").partition("@")
    merged = f" with the adapter {adapter}{f'@{commit[:7]}' if commit else ''}" if adapter else ""
    if base.folder is not None:
        folder = base.folder if whole_path else base.repo_id
        state = base.sha[:7] if base.sha else "not hashed yet" if base.bytes is not None else "not read"
        return f"{folder} ({state}){merged}"
    return f"{base.repo_id}@{base.sha[:7] if base.sha else base.revision}{merged}"


def plan_headline(document: PlanDocument) -> str:
    """Say in one line what would be made of the base."""
    base, output = document.base, document.output
    if base.bytes is None or output.bytes is None:
        return "nothing can be made of it" if document.problems else "not looked at here"
    sizes = f"{gigabytes(base.bytes)} become {gigabytes(output.bytes)}"
    if not isinstance(output, OutputLayout):
        return f"{sizes} in {len(document.outputs or ())} outputs"
    counts = f"{output.quantized_tensors} matrices quantized, {output.kept_tensors} tensors kept"
    return f"{sizes}, {_scheme(output)}: {counts}"


def _scheme(output: OutputLayout) -> str:
    scheme = output.scheme
    group = "whole rows" if scheme.group_size == -1 else f"group {scheme.group_size}"
    return f"W{scheme.bits}A16, {group}, {output.packing}"


def plan_text(document: PlanDocument) -> str:
    """Format the plan for a terminal."""
    console = text_console(160 if document.outputs else 130)
    with console.capture() as capture:
        console.print(
            f"\n{subject(document)}: {plan_headline(document)}\n", highlight=False, markup=False, soft_wrap=True
        )
        if document.stages:
            console.print(table_of(stage_columns(document), stage_rows(document)), "")
            if needs := need_rows(document):
                console.print(table_of(NEED_COLUMNS, needs), "")
            if document.outputs:
                console.print(table_of(OUTPUT_COLUMNS, output_rows(document.outputs)), "")
            else:
                console.print(table_of(TENSOR_COLUMNS, tensor_rows(document)), "")
        for word, sentence in sentences(document):
            console.print(f"{word:12} {sentence}", highlight=False, markup=False, soft_wrap=True)
    return capture.get()


def plan_markdown(document: PlanDocument, title: str) -> str:
    """Format the plan as Markdown, and escape names and sentences, which are untrusted."""
    verdict = "would be stopped" if document.problems else "would run" if document.stages else "has sound keys"
    parts = [
        f"### {escape(title)}: {verdict}",
        f"{_verbatim(subject(document, whole_path=False))}: {escape(plan_headline(document))}",
    ]
    if document.stages:
        parts.append(table(stage_columns(document), stage_rows(document)))
        if needs := need_rows(document):
            parts.append(table(NEED_COLUMNS, needs))
        if document.outputs:
            parts.append(table(OUTPUT_COLUMNS, output_rows(document.outputs)))
        plans: Sequence[Plan] = document.outputs or [document]
        for one in plans:
            rows = [(named(row[0]), *row[1:]) for row in tensor_rows(one)]
            summary = f"tensors of {one.name}" if isinstance(one, PlannedOutput) else "tensors"
            parts.append(f"<details><summary>{summary}</summary>\n\n{table(TENSOR_COLUMNS, rows)}\n\n</details>")
    parts.append("\n".join(f"- {word}: {_verbatim(sentence)}" for word, sentence in sentences(document)))
    return "\n\n".join(parts) + "\n"


def _verbatim(sentence: str) -> str:
    """Format an untrusted sentence as inline code."""
    return "`" + "".join(c if c.isprintable() and c != "`" else " " for c in sentence) + "`"


def stage_columns(document: PlanDocument) -> Row:
    """Return the headers of the table of stages."""
    return ("output", *STAGE_COLUMNS) if document.outputs else STAGE_COLUMNS


def stage_rows(document: PlanDocument) -> list[Row]:
    """Return a row for each stage, and one for all stages together."""
    has_outputs = bool(document.outputs)
    rows = [
        (
            *([stage.output or ""] if has_outputs else []),
            stage.name,
            stage.state,
            gigabytes(stage.bytes) if stage.state == "run" else "",
            format_duration(stage.seconds) if stage.state == "run" else "",
            "" if stage.cost is None else f"{stage.cost:.2f}",
            stage.figure,
        )
        for stage in document.stages
    ]
    total = document.hardware
    cost = "" if total.cost is None else f"{total.cost:.2f}"
    on = f"on {total.gpu}" if total.gpu else ""
    return [*rows, ("all", *([""] if has_outputs else []), "", "", format_duration(total.seconds), cost, on)]


def need_rows(document: PlanDocument) -> list[Row]:
    """Return a row for each stage with the disk and memory that it needs."""
    stages = document.needs.stages if isinstance(document.needs, Needs) else {}
    rows: list[Row] = []
    for name, need in stages.items():
        sizes = (need.disk_bytes, need.ram_bytes, need.vram_bytes, need.low_ram_bytes, need.low_vram_bytes)
        rows.append((name, *(gigabytes(size) if size else "" for size in sizes)))
    return rows


def output_rows(outputs: Sequence[PlannedOutput]) -> list[Row]:
    """Return a row for each output. One that cannot be made has no figures."""
    rows: list[Row] = []
    for one in outputs:
        output, figures = one.output, ("", "", "", "")
        if isinstance(output, OutputLayout):
            counts = str(output.quantized_tensors), str(output.kept_tensors)
            figures = (gigabytes(output.bytes), _scheme(output), *counts)
        rows.append((one.name, one.repo_id or "", *figures))
    return rows


def tensor_rows(plan: Plan) -> list[Row]:
    """Return a row for each group of quantized modules and of kept tensors. A result that cannot be made has none."""
    output = plan.output
    if not isinstance(output, OutputLayout):
        return []
    return [
        *((group.modules, str(group.count), group.storage, gigabytes(group.bytes)) for group in output.quantized),
        *((kept.tensors, str(kept.count), "kept", kept.why) for kept in output.kept),
    ]


def sentences(document: PlanDocument) -> list[tuple[str, str]]:
    """Return the lines that are in no table, each with the word in front of it."""
    lines: list[tuple[str, str]] = []
    needs, transfer = document.needs, document.transfer
    if isinstance(needs, Needs):
        moved = f"{gigabytes(transfer.download_bytes)} down, {gigabytes(transfer.upload_bytes)} up"
        lines.append(("moves", f"{moved}; {gigabytes(needs.disk_bytes)} of disk below the store"))
    lines += [("calibration", _source_words(source)) for source in document.calibration or ()]
    lines += [("publish", f"to {document.repo_id}")] if document.repo_id is not None else []
    lines += [(engine, verdict.text(engine)) for engine, verdict in document.engines.items()]
    lines += [("changed", line) for line in _changes(document.changes)]
    lines += [("again", _again(stage)) for stage in document.stages if stage.again is not None]
    lines += [("note", note) for note in document.notes]
    lines += [("warning", warning) for warning in document.warnings]
    return lines + ([("problem", problem) for problem in document.problems] or [("problems", "none")])


def _again(stage: PlannedStage) -> str:
    """Say why a stage runs although the store has an earlier result of it."""
    return f"{stage.name}{f' of {stage.output}' if stage.output else ''}: {stage.again}"


def _source_words(source: PlannedSource) -> str:
    words = [f"column {source.field}"] if source.field is not None else []
    words += [f"weight {source.weight:g}"] if source.weight is not None else []
    words += ["chats through the base's template"] if source.chats else []
    words += [f"license {source.license}"] if source.license is not None else []
    return ", ".join([source.source, *words])


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
