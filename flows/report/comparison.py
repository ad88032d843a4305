"""The comparison of two checkpoints as text for a terminal."""

from __future__ import annotations

from requant.flows.report.console import text_console
from requant.flows.report.terminal import table_of
from requant.tasks.validating.comparison import Answer, ComparisonDocument, Difference

HEADER = ("domain", "KL of A", "KL of B", "A is better by", "", "drafts of A", "drafts of B", "A is better by", "")
WORDS = {"a": "A is better", "b": "B is better", "no difference": "no difference", None: "not judged"}


def comparison_text(document: ComparisonDocument) -> str:
    """Render a comparison: a row for each domain, and the answer in a sentence."""
    drafts = any(row.mtp_acceptance for row in document.domains.values())
    rows = []
    for name, row in document.domains.items():
        cells = _cells(row.kl_divergence, "{:.4f}") + (_cells(row.mtp_acceptance, "{:.1%}") if drafts else ())
        rows.append((name.replace("_", " "), *cells))
    console = text_console(130)
    with console.capture() as capture:
        for letter, name in (("A", document.a), ("B", document.b), ("base", document.base), ("text", document.text)):
            console.print(f"{letter:5} {name}", highlight=False, markup=False, soft_wrap=True)
        console.print(table_of(HEADER if drafts else HEADER[:5], rows))
        console.print(f"\n{answer_sentence(document)}", highlight=False, markup=False, soft_wrap=True)
    return capture.get().rstrip("\n")


def answer_sentence(document: ComparisonDocument) -> str:
    """Say which checkpoint is better, and where."""
    if document.answer is None:
        return "not judged: the text has too few tokens, or a value is not finite: name a longer text in the recipe"
    if document.answer == "no difference":
        return "no difference that other text or another seed would not explain"
    better = document.better_in
    letters: tuple[Answer, ...] = ("a", "b")
    parts = [f"{letter.upper()} is better in {_listed(better[letter])}" for letter in letters if better[letter]]
    if better["no difference"]:
        parts.append(f"no difference in {_listed(better['no difference'])}")
    return "; ".join(parts)


def _listed(names: list[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)


def _cells(row: Difference | None, number: str) -> tuple[str, ...]:
    """Write the values of A and B, their difference with its interval, and what follows."""
    if row is None:
        return ("-",) * 4
    within = "" if row.interval is None else f" [{row.interval[0]:+.1%}, {row.interval[1]:+.1%}]"
    return number.format(row.a), number.format(row.b), f"{row.difference:+.1%}{within}", WORDS[row.answer]
