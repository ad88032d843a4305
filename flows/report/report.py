"""What a run says at its end: a JSON document, and the rows of the tables that a person reads.

A run of a recipe with outputs has a report for each of them, and one of its own that holds these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from requant.tasks.artifact import Manifest
from requant.tasks.card.filters import number
from requant.tasks.formatting import gigabytes
from requant.tasks.hub.revision import Revision
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.plots import Picture
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.redaction import without_non_finite
from requant.tasks.store.runs import Run
from requant.tasks.validating.gates import Gate, refusal, summary

STATUSES = ("published", "validated", "rejected", "failed")  # the worst last
COMPARISON_COLUMNS = ("output", "", "size", "smaller", "perplexity", "same token", "drafts taken", "tokens/s", "gates")


@dataclass
class RunReport:
    """A run so far, or one output of it, by `name`. `status` is published, validated, rejected (a gate failed) or
    failed."""

    recipe: Recipe
    name: str = ""
    settled: Recipe | None = None  # the recipe with a number for a group size of auto, once the base is known
    status: str = "failed"
    base: Revision | None = None
    artifact: Manifest | None = None
    path: Path | None = None
    stages: list[StageResult] = field(default_factory=list)
    measured: dict[str, Any] | None = None
    gates: list[Gate] = field(default_factory=list)
    benchmark: dict[str, Any] | None = None
    published: dict[str, Any] | None = None
    beside: Mapping[str, bytes] = field(default_factory=dict)  # the card and what else goes with the artifact
    pictures: list[Picture] = field(default_factory=list)
    error: str | None = None
    outputs: dict[str, RunReport] = field(default_factory=dict)  # by name, if the recipe has several

    @property
    def each(self) -> dict[str, RunReport]:
        """The reports of one result each: as `Recipe.each`, as far as the run came."""
        return self.outputs if self.recipe.outputs else {"": self}

    def to_json(self) -> dict[str, Any]:
        """The document of `requant run --json`. Of several outputs it holds theirs, and their stages and gates in a
        row; what only one result can have is null."""
        document = self._document()
        if self.recipe.outputs:
            outputs = [{"name": name, **one.to_json()} for name, one in self.outputs.items()]
            for key in ("stages", "gates"):
                document[key] = [{"output": each["name"], **row} for each in outputs for row in each[key]]
            document["outputs"] = outputs
        return document

    def _document(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "base": {"repo_id": self.recipe.base.repo_id, "sha": self.base.sha if self.base else None},
            "artifact": {
                "digest": self.artifact.digest if self.artifact else None,
                "path": str(self.path) if self.path else None,
            },
            "stages": [{"name": s.name, "state": s.state, "seconds": s.seconds} for s in self.stages],
            "gates": [gate.to_json() for gate in self.gates],
            "benchmark": self.benchmark,
            "published": self.published,
            "measured": without_non_finite(self.measured),
            "error": self.error,
        }

    @property
    def run(self) -> Run | None:
        """What the store keeps of it: which artifacts are in use, by which recipe on which base."""
        artifacts = {(stage.name, stage.key): None for one in [*self.each.values()] for stage in one.stages}
        if self.base is None or not artifacts:
            return None
        makes = ", ".join(one.publish.repo_id if one.publish else scheme_of(one) for one in self.recipe.each.values())
        return Run(self.recipe.digest[:16], f"{self.base.repo_id}@{self.base.sha}", makes, tuple(artifacts))

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The quantize stage's record of its blocks."""
        return next((s.provenance.get("blocks") or [] for s in self.stages if s.name == "quantize"), [])


def scheme_of(recipe: Recipe) -> str:
    """Bits and group size, as a run is known by."""
    bits, group_size, _ = recipe.quantize.asked
    return f"W{bits}A16 g{group_size}"


def run_headline(report: RunReport) -> str:
    """What was made from what, in one line."""
    base = f"{report.recipe.base.repo_id}@{report.base.sha[:7]}" if report.base else report.recipe.base.repo_id
    name = f"{report.name}: " if report.name else ""
    if report.outputs:
        return f"{base} -> {', '.join(report.outputs)}"
    if report.artifact is None:
        return f"{name}{base}: nothing made"
    size = gigabytes(report.artifact.size)
    return (
        f"{name}{base} -> {scheme_of(report.settled or report.recipe)}, {size}, artifact {report.artifact.digest[:12]}"
    )


def verdict(report: RunReport) -> str:
    """What came of a run, in one sentence; of several outputs each by its name."""
    if report.error is not None:
        return report.error
    if report.outputs:
        return "; ".join(f"{name} {_came_to(one)}" for name, one in report.outputs.items())
    if report.status == "rejected":
        return f"nothing was published: {refusal(report.gates)}"
    return run_headline(report)


def _came_to(report: RunReport) -> str:
    return report.status if report.status in STATUSES[:2] else f"{report.status} ({verdict(report)})"


def worst(reports: Iterable[RunReport]) -> str:
    """The status that several come to."""
    return max((report.status for report in reports), key=STATUSES.index, default="failed")


def compared_rows(report: RunReport) -> list[tuple[str, ...]]:
    """The outputs side by side. Headed COMPARISON_COLUMNS."""
    return [_compared(name, one) for name, one in report.outputs.items()]


def _compared(name: str, report: RunReport) -> tuple[str, ...]:
    measured, speed = report.measured or {}, report.benchmark or {}
    size = report.artifact.weights if report.artifact else 0
    base = next((stage.manifest.weights for stage in report.stages if stage.name == "download"), 0)
    return (
        name,
        report.status,
        gigabytes(size) if size else "",
        f"{base / size:.2f} times" if base and size else "",
        number(measured.get("perplexity_increase"), "+.1%"),
        number(measured.get("top1_agreement"), ".1%"),
        number(measured.get("mtp_acceptance"), ".1%"),
        number(speed.get("tokens_per_second"), ".1f"),
        summary(report.gates) if report.gates else "",
    )


def published_words(published: Mapping[str, Any]) -> str:
    """What became of a release: `published` is its document."""
    if published["pull_request"]:
        return f"waits to be merged: {published['pull_request']}"
    return f"{'published' if published['changed'] else 'already published'}, tag {published['tag']}"


def stage_rows(report: RunReport) -> list[tuple[str, ...]]:
    return [(s.name, s.state, f"{s.seconds:.1f}", gigabytes(s.manifest.size)) for s in report.stages]


def gate_rows(gates: Iterable[Gate]) -> list[tuple[str, ...]]:
    return [
        (
            gate.name,
            "not measured" if gate.value is None else f"{gate.value:.4g}",
            "none" if gate.limit is None else f"{gate.limit:.4g}",
            "FAILED" if gate.failed else gate.result,
            gate.note,
        )
        for gate in gates
    ]
