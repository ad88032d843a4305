"""What a pull request says: why, the verdicts before and after, and what changes."""

from __future__ import annotations

from collections.abc import Sequence

import requant
from requant.tasks.card.filters import Markdown, cell, fence, named, table
from requant.tasks.checkpoint.advice import without_advice
from requant.tasks.checkpoint.config import HeadPrecision
from requant.tasks.checkpoint.document import Diagnosis, MtpFixDocument

TITLE = "Repair the checkpoint with requant mtp-fix"
MAX_PROBLEMS = 10


def describe(document: MtpFixDocument, precision: HeadPrecision) -> str:
    """Return the description of the pull request of a repair, as Markdown. Whatever the repo says is shown as text."""
    assert document.before is not None and document.after is not None
    before, after = document.before, document.after
    verdicts = table(
        ("engine", "before", "after"),
        [(engine, _verdict(before, engine), _verdict(after, engine)) for engine in after.engines],
    )
    files = table(
        ("file", "change"),
        [
            *((named(path), _written(document.sizes[path])) for path in document.writes),
            *((named(path), "removed") for path in document.removes),
        ],
    )
    base = f" --base {document.base}" if document.base else ""
    parts = [
        _reason(document, precision),
        verdicts,
        _problems("`requant inspect` finds in main", before.problems),
        _problems("It finds with these changes", after.problems),
        files,
        f"The verdicts are worked out from headers and configs, by Requant {requant.__version__}; no engine was "
        "started. This shows them again, and sends nothing:",
        fence(f"requant mtp-fix {document.repo}@{document.sha}{base}"),
    ]
    return "\n\n".join(parts)


def head_text(document: MtpFixDocument, precision: HeadPrecision) -> str:
    """Say in part of a sentence what a repair does to the MTP head."""
    if not document.tensors_restored:
        return "no tensor of the head differs"
    tensors = f"{document.tensors_restored} tensors of the head"
    if document.source == "dequantized":
        return f"{tensors} dequantized (lossy)"
    return f"{tensors} from the base" + (f", its layers rounded to {precision.upper()}" if precision != "keep" else "")


def improvements(before: Diagnosis, after: Diagnosis) -> list[str]:
    """Return what was in the way of each engine that makes more of the checkpoint now, and the problems that are gone.

    Without one, and if the head is the base's, there is no reason for a change.
    """
    engines = [(verdict, after.engines.get(engine)) for engine, verdict in before.engines.items()]
    reasons = [old.reason for old, new in engines if new is not None and new.rank > old.rank]
    return reasons + [problem for problem in before.problems if problem not in after.problems]


def _reason(document: MtpFixDocument, precision: HeadPrecision) -> str:
    """Return one paragraph that says why the repo should have the change, and what the change leaves alone."""
    assert document.before is not None and document.after is not None
    before, after = document.before, document.after
    mended = improvements(before, after)
    if mended:
        cause = f"This checkpoint has a problem: {_text(without_advice(mended[0]))}."
    elif precision != "keep":
        cause = "The MTP head can be smaller."
    else:
        cause = "The MTP head is not that of the base."
    base = f" (base: {named(document.base)})" if document.base else ""
    return (
        f"{cause} The repair: {head_text(document, precision)}{base}, with an index and configs that describe what the "
        "files hold. All other tensors keep their bytes."
    )


def _verdict(diagnosis: Diagnosis, engine: str) -> Markdown:
    verdict = diagnosis.engines.get(engine)
    return _text("cannot be opened" if verdict is None else verdict.text(engine))


def _written(size_bytes: int) -> str:
    return f"{size_bytes:,} bytes" if size_bytes else "renamed"


def _problems(found: str, problems: Sequence[str]) -> str:
    """List the first problems; `found` is the beginning of a sentence."""
    if not problems:
        return f"{found}: no problem."
    more = [f"- and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "\n".join([f"{found}:\n", *(f"- {_text(problem)}" for problem in problems[:MAX_PROBLEMS]), *more])


def _text(value: object) -> Markdown:
    """Escape a sentence from outside. It mentions no account of the Hub, which would then be told."""
    return Markdown(cell(value).replace("@", "&#64;"))
