"""Says from headers and config alone what a checkpoint is: quantized how, with which head, loaded by whom."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.data_checks import deep_problems
from requant.tasks.checkpoint.inventory import head_document, inventory, scheme_fields, storage_of
from requant.tasks.checkpoint.problems import problems_of
from requant.tasks.checkpoint.untrusted import shown

MAX_SHOWN_GROUPS = 80  # are shown to a person
MAX_PROBLEMS = 1000  # are told; a hostile index has a million


def inspect_checkpoint(folder: Path, *, deep: bool = False) -> dict[str, Any]:
    """The document of `requant inspect --json`. Raises CheckpointError if the folder is no checkpoint.

    `deep` reads the data too.
    """
    checkpoint = Checkpoint.open(folder)
    quantization = checkpoint.quantization
    stored = Counter(storage_of(m, quantization) for m in checkpoint.modules.values() if m.quantized)
    judgement = Judgement.of(checkpoint)
    problems = problems_of(checkpoint, judgement)
    if deep and not checkpoint.fatal:
        problems += deep_problems(checkpoint)
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more problems"]
    return {
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values()).most_common()),
        "quantized": {
            "count": stored.total(),
            **{key: _plain(value) for key, value in scheme_fields(quantization).items()},
            "method": _plain(quantization.get("quant_method")),
            "packing": _plain(quantization.get("packing_format")),
            "storage": dict(stored.most_common()),
        },
        "groups": [group.to_json() for group in inventory(checkpoint)],
        "mtp": head_document(checkpoint),
        "engines": judgement.verdicts,
        "problems": problems,
    }


def as_text(name: str, result: dict[str, Any]) -> str:
    """The same for a person: what it is made of, the head, the engines, the problems."""
    quantized, mtp = result["quantized"], result["mtp"]
    rows = [("modules", "count", "stored as", "bytes")]
    rows += [
        (g["modules"], f"{g['count']:,}", g["storage"], f"{g['bytes']:,}") for g in result["groups"][:MAX_SHOWN_GROUPS]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{name}: {result['tensors']:,} tensors, {result['bytes']:,} bytes", ""]
    lines += [f"{m:{widths[0]}}  {c:>{widths[1]}}  {s:{widths[2]}}  {b:>{widths[3]}}" for m, c, s, b in rows]
    if len(result["groups"]) > MAX_SHOWN_GROUPS:
        lines.append(f"and {len(result['groups']) - MAX_SHOWN_GROUPS} more groups (--json has them all)")
    lines.append("")
    if quantized["count"]:
        how = ", ".join(f"{count:,} {storage}" for storage, count in quantized["storage"].items())
        words = [f"{how}", f"group {quantized['group_size']}", str(quantized["packing"] or quantized["method"])]
        lines.append(f"quantized     {', '.join(words)}")
    else:
        lines.append("quantized     nothing")
    lines.append(f"MTP head      {_head_words(mtp)}")
    for engine, verdict in result["engines"].items():
        words = [
            "loads" if verdict["loads"] else "does not load",
            "drafts" if verdict["mtp"] else "does not draft",
        ]
        lines.append(f"{engine:13} {', '.join(words)}: {verdict['reason']}")
    lines += [f"problem       {problem}" for problem in result["problems"]] or ["problems      none"]
    return "\n".join(lines)


def _plain(value: Any) -> int | str | None:
    """A value of a stranger's config that JSON can hold and a line can show."""
    return shown(value) if isinstance(value, str) else value if isinstance(value, int) else None


def _head_words(mtp: dict[str, Any]) -> str:
    if not mtp["present"]:
        return "none"
    complete = "complete" if mtp["complete"] else f"lacks {', '.join(mtp['missing'][:3])}"
    experts = f", experts {mtp['experts']}" if mtp["experts"] else ""
    return f"{mtp['layers']} layers, {mtp['layout']}{experts}, {mtp['precision']}, {mtp['bytes']:,} bytes, {complete}"
