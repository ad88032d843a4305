"""The report of a run: its JSON document, and the rows of the tables that a person reads.

A run of a recipe with outputs has one report per output, and a report of its own that holds these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from requant.flows.report.document import RunArtifact, RunBase, RunDocument, RunStage, Status
from requant.tasks.artifact import Manifest
from requant.tasks.card.filters import number
from requant.tasks.formatting import gigabytes
from requant.tasks.hub.release import Release
from requant.tasks.hub.revision import Revision
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.plots import Picture
from requant.tasks.probing.compare import ProbeSummary
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.record import RecordedBlock, StageRecord
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.store.runs import Run
from requant.tasks.validating.drafts import DraftComparison
from requant.tasks.validating.gates import Gate, refusal, summary
from requant.tasks.validating.measured import Measured

STATUSES: tuple[Status, ...] = ("published", "validated", "rejected", "failed")  # from the best to the worst
COMPARISON_COLUMNS = (
    "output", "", "size", "smaller", "perplexity", "same token", "draft acceptance", "tokens/s", "gates",
)  # fmt: skip


@dataclass
class RunReport:
    """A run up to now, or the output of it that has this name.

    `status` is published, validated, rejected (a gate failed) or failed.
    """

    recipe: Recipe
    name: str = ""
    settled: Recipe | None = None  # the recipe with a number for group_size: auto, once the base is known
    status: Status = "failed"
    base: Revision | None = None
    artifact: Manifest | None = None
    path: Path | None = None
    stages: list[StageResult] = field(default_factory=list)
    measured: Measured | None = None
    gates: list[Gate] = field(default_factory=list)
    benchmark: BenchmarkResult | None = None
    drafts: DraftComparison | None = None  # in the engine of the benchmark
    probes: ProbeSummary | None = None  # None if the recipe has none, or they could not be measured
    published: Release | None = None
    beside: Mapping[str, bytes] = field(default_factory=dict)  # the card and other release files, by name
    pictures: list[Picture] = field(default_factory=list)
    error: str | None = None
    outputs: dict[str, RunReport] = field(default_factory=dict)  # by name, for a recipe with outputs

    @property
    def each(self) -> dict[str, RunReport]:
        """The reports with one result each, by the names of `Recipe.each`. Outputs that were not begun are absent."""
        return self.outputs if self.recipe.outputs else {"": self}

    def document(self) -> RunDocument:
        """Return the document of `requant run --json`. With outputs, it has a document for each of them."""
        return RunDocument(
            name=self.name or None,
            status=self.status,
            base=RunBase(
                repo_id=self.recipe.base.name,
                sha=self.base.sha if self.base else None,
                adapter=self.base.adapter.name if self.base and self.base.adapter else None,
            ),
            artifact=RunArtifact(
                digest=self.artifact.digest if self.artifact else None, path=str(self.path) if self.path else None
            ),
            stages=tuple(RunStage(name=s.name, state=s.state, seconds=s.seconds) for s in self.stages),
            gates=tuple(self.gates),
            benchmark=self.benchmark,
            drafts=self.drafts,
            probes=self.probes,
            published=self.published,
            measured=self.measured,
            error=self.error,
            outputs=tuple(one.document() for one in self.outputs.values()) if self.recipe.outputs else None,
        )

    @property
    def run(self) -> Run | None:
        """The record for the store, which says that this recipe uses these artifacts for this base."""
        artifacts = {(stage.name, stage.key): None for one in [*self.each.values()] for stage in one.stages}
        if self.base is None or not artifacts:
            return None
        makes = ", ".join(one.publish.repo_id if one.publish else scheme_of(one) for one in self.recipe.each.values())
        return Run(self.recipe.digest[:16], f"{self.base.repo_id}@{self.base.sha}", makes, tuple(artifacts))

    @property
    def blocks(self) -> Sequence[RecordedBlock]:
        """The decoder blocks as the quantize stage recorded them, with losses before and after tuning."""
        return self._quantized.blocks

    @property
    def experts(self) -> Mapping[str, Sequence[int]]:
        """How many tokens of the calibration each expert got, by the name of the module that has the experts."""
        return self._quantized.experts

    @property
    def _quantized(self) -> StageRecord:
        """The record of the quantize stage; an empty one if there is none."""
        return next((stage.provenance for stage in self.stages if stage.name == "quantize"), StageRecord())


def scheme_of(recipe: Recipe) -> str:
    """Name the bits and the group size."""
    bits, group_size, _ = recipe.quantize.asked
    return f"W{bits}A16 g{group_size}"


def run_headline(report: RunReport) -> str:
    """Say in one line what was made from which base."""
    base = f"{report.recipe.base.name}@{report.base.sha[:7]}" if report.base else report.recipe.base.name
    if report.base and report.base.adapter:
        base += f" with {report.base.adapter.repo_id}@{report.base.adapter.sha[:7]}"
    name = f"{report.name}: " if report.name else ""
    if report.outputs:
        return f"{base} -> {', '.join(report.outputs)}"
    if report.artifact is None:
        return f"{name}{base}: nothing made"
    size = gigabytes(report.artifact.weights)  # the size of a model, as the card has it
    return (
        f"{name}{base} -> {scheme_of(report.settled or report.recipe)}, {size}, artifact {report.artifact.digest[:12]}"
    )


def verdict(report: RunReport) -> str:
    """Say in one sentence how a run ended; with outputs, how each of them ended."""
    if report.error is not None:
        return report.error
    if report.outputs:
        return "; ".join(f"{name} {_status_words(one)}" for name, one in report.outputs.items())
    if report.status == "rejected":
        return f"nothing was published: {refusal(report.gates)}"
    return run_headline(report)


def _status_words(report: RunReport) -> str:
    return report.status if report.status in STATUSES[:2] else f"{report.status} ({verdict(report)})"


def worst(reports: Iterable[RunReport]) -> Status:
    """Return the worst status of some reports; failed if there are none."""
    return STATUSES[max((STATUSES.index(report.status) for report in reports), default=-1)]


def compared_rows(report: RunReport) -> list[tuple[str, ...]]:
    """Make a row for each output, with the columns COMPARISON_COLUMNS."""
    return [_compared_row(name, one) for name, one in report.outputs.items()]


def _compared_row(name: str, report: RunReport) -> tuple[str, ...]:
    measured, speed = report.measured or Measured(), report.benchmark
    size_bytes = report.artifact.weights if report.artifact else 0
    base_bytes = next((stage.manifest.weights for stage in report.stages if stage.name == "download"), 0)
    return (
        name,
        report.status,
        gigabytes(size_bytes) if size_bytes else "",
        f"{base_bytes / size_bytes:.2f} times" if base_bytes and size_bytes else "",
        number(measured.behaviour.perplexity_increase, "+.1%"),
        number(measured.behaviour.top1_agreement, ".1%"),
        number(measured.behaviour.quantized.mtp_acceptance, ".1%"),
        number(speed.tokens_per_second if speed else None, ".1f"),
        summary(report.gates) if report.gates else "",
    )


def published_words(release: Release) -> str:
    """Say whether a release was published, was published before, or waits in a pull request."""
    if release.pull_request:
        return f"waits to be merged: {release.pull_request}"
    return f"{'published' if release.changed else 'already published'}, tag {release.tag}"


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
