"""Describes a checkpoint from headers and configs: how it is quantized, its MTP head, and which engines load it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.companions import has_vocabulary
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.config import Scalar
from requant.tasks.checkpoint.data_checks import deep_problems
from requant.tasks.checkpoint.document import HeadDocument, InspectDocument, QuantizedWeights
from requant.tasks.checkpoint.heads.drafters import drafter_kind
from requant.tasks.checkpoint.heads.layouts import UNKNOWN
from requant.tasks.checkpoint.inventory import head_document, inventory, storage_of
from requant.tasks.checkpoint.methods import full_name
from requant.tasks.checkpoint.problems import problems_of
from requant.tasks.checkpoint.untrusted import shown

MAX_SHOWN_GROUPS = 80  # in the text; the JSON document has all groups
MAX_PROBLEMS = 1000  # a hostile index may have a million
COMPLETE = {
    True: "yes: all tensors that its architecture needs",
    False: "no: see the problems",
    None: "not judged: Requant does not know what config.json describes; the layers do not contradict each other",
}


def inspect_checkpoint(folder: Path, *, deep: bool = False) -> InspectDocument:
    """Describe a checkpoint and find what is wrong with it. `deep`: read the tensors' data too.

    Raises CheckpointError if the folder holds no checkpoint.
    """
    checkpoint = Checkpoint.open(folder)
    quantization = checkpoint.quantization
    stored = Counter(storage_of(m, checkpoint.reading) for m in checkpoint.modules.values() if m.quantized)
    judgement = Judgement.of(checkpoint)
    problems = problems_of(checkpoint, judgement)
    if deep and not checkpoint.fatal:
        problems += deep_problems(checkpoint)
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more problems"]
    scheme = checkpoint.reading.shared(checkpoint.modules.values())
    return InspectDocument(
        tensors=len(checkpoint.tensors),
        bytes=checkpoint.nbytes,
        dtypes=dict(Counter(t.dtype for t in checkpoint.tensors.values()).most_common()),
        quantized=QuantizedWeights(
            count=stored.total(),
            bits=_printable(scheme.bits),
            group_size=_printable(scheme.group_size),
            sym=_printable(scheme.sym),
            method=_printable(quantization.get("quant_method")),
            name=full_name(checkpoint.method, quantization) if checkpoint.method else None,
            packing=_printable(quantization.get("packing_format")),
            storage=dict(stored.most_common()),
        ),
        groups=inventory(checkpoint),
        complete=None if checkpoint.fatal else checkpoint.completeness.complete,
        mtp=head_document(checkpoint),
        drafter=drafter_kind(checkpoint.config),
        tokenizer=has_vocabulary(path.name for path in folder.iterdir()),
        engines=judgement.verdicts,
        problems=problems,
    )


def as_text(name: str, document: InspectDocument) -> str:
    """Return the document as text for a terminal."""
    quantized, groups = document.quantized, document.groups
    rows = [("modules", "count", "stored as", "bytes")]
    rows += [(g.modules, f"{g.count:,}", g.storage, f"{g.bytes:,}") for g in groups[:MAX_SHOWN_GROUPS]]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{name}: {document.tensors:,} tensors, {document.bytes:,} bytes", ""]
    lines += [f"{m:{widths[0]}}  {c:>{widths[1]}}  {s:{widths[2]}}  {b:>{widths[3]}}" for m, c, s, b in rows]
    if len(groups) > MAX_SHOWN_GROUPS:
        lines.append(f"and {len(groups) - MAX_SHOWN_GROUPS} more groups (--json has them all)")
    lines.append("")
    if quantized.count:
        parts = [f"{count:,} {storage}" for storage, count in quantized.storage.items()]
        parts += [f"group {quantized.group_size}"] if quantized.group_size is not None else []
        parts += [str(how)] if (how := quantized.packing or quantized.name) is not None else []
        lines.append(f"quantized     {', '.join(parts)}")
    else:
        named = f" that Requant knows of {quantized.name}" if quantized.name else ""
        lines.append(f"quantized     nothing{named}")
    lines.append(f"complete      {COMPLETE[document.complete]}")
    lines.append(f"MTP head      {_head_text(document.mtp)}")
    if document.tokenizer is False:
        lines.append("tokenizer     none: engines and plan refuse it; add that of the model that it was made of")
    if document.drafter:
        lines.append(f"draft model   {document.drafter}: a drafter for its base, not a base model")
    lines += [f"{engine:13} {verdict.text(engine)}" for engine, verdict in document.engines.items()]
    lines += [f"problem       {problem}" for problem in document.problems] or ["problems      none"]
    return "\n".join(lines)


def _printable(value: object) -> Scalar:
    """Return a value of a config in a form that JSON can hold and one line can show."""
    return shown(value) if isinstance(value, str) else value if isinstance(value, int) else None


def _head_text(head: HeadDocument) -> str:
    if not head.present:
        return "none"
    if head.layout == UNKNOWN:
        return f"{head.layers} layers of an unknown layout: kept as it is, {head.precision}, {head.bytes:,} bytes"
    complete = "complete" if head.complete else f"lacks {', '.join(head.missing[:3])}"
    experts = f", experts {head.experts}" if head.experts else ""
    return f"{head.layers} layers, {head.layout}{experts}, {head.precision}, {head.bytes:,} bytes, {complete}"
