"""A plan for a person: a table in a terminal, markdown for a pull request and for Prefect's UI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from requant.flows.report.terminal import table_of
from requant.tasks.card.filters import named, plain, table
from requant.tasks.formatting import gigabytes
from requant.tasks.pipeline.prefect import duration

Document = Mapping[str, Any]
Row = tuple[str, ...]
STAGES = ("stage", "state", "bytes", "time", "cost", "figure from")
NEEDS = ("stage", "disk", "memory", "GPU memory", "low_gpu_mem: memory", "GPU memory there")
TENSORS = ("tensors", "count", "", "why")
OUTPUTS = ("output", "repo", "bytes", "scheme and packing", "packed", "kept")


def subject(document: Document) -> str:
    """The base, by name and commit."""
    base = document["base"]
    return f"{base['repo_id']}@{base['sha'][:7] if base['sha'] else base['revision']}"


def headline(document: Document) -> str:
    """What would be made of it, in one line."""
    base, output = document["base"], document["output"]
    if output["bytes"] is None:
        return "nothing can be made of it"
    sizes = f"{gigabytes(base['bytes'])} become {gigabytes(output['bytes'])}"
    if document.get("outputs"):
        return f"{sizes} in {len(document['outputs'])} outputs"
    counts = f"{output['quantized_tensors']} matrices packed, {output['kept_tensors']} tensors kept"
    return f"{sizes}, {_scheme(output)}: {counts}"


def _scheme(output: Document) -> str:
    scheme = output["scheme"]
    group = "whole rows" if scheme["group_size"] == -1 else f"group {scheme['group_size']}"
    return f"W{scheme['bits']}A16, {group}, {output['packing']}"


def render(document: Document) -> str:
    """The plan in a terminal."""
    console = Console(width=160 if document.get("outputs") else 130, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(f"\n{subject(document)}: {headline(document)}\n", highlight=False, markup=False, soft_wrap=True)
        if document["stages"]:
            what = (OUTPUTS, output_rows) if document.get("outputs") else (TENSORS, tensor_rows)
            for header, rows in ((stage_header(document), stage_rows), (NEEDS, need_rows), what):
                console.print(table_of(header, rows(document)), "")
        for word, sentence in sentences(document):
            console.print(f"{word:12} {sentence}", highlight=False, markup=False, soft_wrap=True)
    return capture.get()


def markdown(document: Document, title: str) -> str:
    """The plan as markdown. Names and sentences come from outside: nothing in them is more than text."""
    verdict = "would be stopped" if document["problems"] else "would run"
    parts = [f"### {plain(title)}: {verdict}", f"{_verbatim(subject(document))}: {plain(headline(document))}"]
    if document["stages"]:
        parts.append(table(stage_header(document), stage_rows(document)))
        parts.append(table(NEEDS, need_rows(document)))
        if document.get("outputs"):
            parts.append(table(OUTPUTS, output_rows(document)))
        for one in document.get("outputs") or [document]:
            rows = [(named(row[0]), *row[1:]) for row in tensor_rows(one)] if one["stages"] else []
            summary = f"tensors of {one['name']}" if "name" in one else "tensors"
            parts.append(f"<details><summary>{summary}</summary>\n\n{table(TENSORS, rows)}\n\n</details>")
    parts.append("\n".join(f"- {word}: {_verbatim(sentence)}" for word, sentence in sentences(document)))
    return "\n\n".join(parts) + "\n"


def _verbatim(sentence: str) -> str:
    """A sentence as code, which nothing in it can leave."""
    return "`" + "".join(c if c.isprintable() and c != "`" else " " for c in sentence) + "`"


def stage_header(document: Document) -> Row:
    return ("output", *STAGES) if document.get("outputs") else STAGES


def stage_rows(document: Document) -> list[Row]:
    several = bool(document.get("outputs"))
    rows = [
        (
            *([stage["output"]] if several else []),
            stage["name"],
            stage["state"],
            gigabytes(stage["bytes"]) if stage["state"] == "run" else "",
            duration(stage["seconds"]) if stage["state"] == "run" else "",
            "" if stage["cost"] is None else f"{stage['cost']:.2f}",
            stage["figure"],
        )
        for stage in document["stages"]
    ]
    whole = document["hardware"]
    cost = "" if whole["cost"] is None else f"{whole['cost']:.2f}"
    on = f"on {whole['gpu']}" if whole["gpu"] else ""
    return [*rows, ("all", *([""] if several else []), "", "", duration(whole["seconds"]), cost, on)]


def need_rows(document: Document) -> list[Row]:
    keys = ("disk_bytes", "ram_bytes", "vram_bytes", "low_ram_bytes", "low_vram_bytes")
    return [
        (name, *(gigabytes(need[key]) if key in need else "" for key in keys))
        for name, need in document["needs"]["stages"].items()
    ]


def output_rows(document: Document) -> list[Row]:
    """What each output comes to; one that cannot be made has no figures."""
    rows = []
    for one in document["outputs"]:
        output, known = one["output"], one["output"]["bytes"] is not None
        figures = (gigabytes(output["bytes"]), _scheme(output)) if known else ("", "")
        counts = (str(output[key]) if known else "" for key in ("quantized_tensors", "kept_tensors"))
        rows.append((one["name"], one["repo_id"] or "", *figures, *counts))
    return rows


def tensor_rows(document: Document) -> list[Row]:
    output = document["output"]
    packed = [
        (group["modules"], str(group["count"]), group["storage"], gigabytes(group["bytes"]))
        for group in output["quantized"]
    ]
    return packed + [(kept["tensors"], str(kept["count"]), "kept", kept["why"]) for kept in output["kept"]]


def sentences(document: Document) -> list[tuple[str, str]]:
    """What no table holds, each with the word that it stands under."""
    found: list[tuple[str, str]] = []
    needs, transfer = document["needs"], document["transfer"]
    if document["stages"]:
        moved = f"{gigabytes(transfer['download_bytes'])} down, {gigabytes(transfer['upload_bytes'])} up"
        found.append(("moves", f"{moved}; {gigabytes(needs['disk_bytes'])} of disk below the store"))
    for engine, verdict in document["engines"].items():
        loads = "loads" if verdict["loads"] else "does not load"
        drafts = "drafts" if verdict["mtp"] else "does not draft"
        found.append((engine, f"{loads}, {drafts}: {verdict['reason']}"))
    found += [("changed", line) for line in _changes(document["changes"])]
    found += [("note", note) for note in document["notes"]]
    return found + ([("problem", problem) for problem in document["problems"]] or [("problems", "none")])


def _changes(changes: Document | None) -> list[str]:
    if changes is None:
        return []
    counts = ", ".join(f"{len(names)} {word}" for word, names in changes["files"].items())
    lines = [f"files since {changes['since'][:7]}: {counts}"]
    if changes["tensors"] is not None:
        tensors = changes["tensors"]
        words = ", ".join(f"{len(tensors[word])} {word}" for word in ("added", "removed", "retyped"))
        lines.append(f"tensors: {words}, {tensors['in_changed_shards']} in shards that changed")
    return lines + [f"config.json: {c['field']} was {c['before']}, is {c['now']}" for c in changes["config"]]
