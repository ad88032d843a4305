"""What a run says at its end: a JSON document, and the rows of the tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.artifact import Manifest
from tasks.gates import Gate
from tasks.hub.markdown import gigabytes
from tasks.hub.public import finite
from tasks.hub.revision import Revision
from tasks.pictures import Picture
from tasks.recipe import Recipe
from tasks.stage import StageResult
from tasks.store.runs import Run


@dataclass
class Report:
    """A run so far. `status` is published, validated, rejected (a gate failed) or failed."""

    recipe: Recipe
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

    def to_json(self) -> dict[str, Any]:
        """The document of `requant run --json`."""
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
            "measured": finite(self.measured),
            "error": self.error,
        }

    @property
    def run(self) -> Run | None:
        """What the store keeps of it: which artifacts are in use, by which recipe on which base."""
        if self.base is None or not self.stages:
            return None
        bits, group_size, _ = self.recipe.quantize.resolved
        makes = self.recipe.publish.repo_id if self.recipe.publish else f"W{bits}A16 g{group_size}"
        artifacts = tuple((stage.name, stage.key) for stage in self.stages)
        return Run(self.recipe.digest[:16], f"{self.base.repo_id}@{self.base.sha}", makes, artifacts)

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The quantize stage's record of its blocks."""
        return next((s.provenance.get("blocks") or [] for s in self.stages if s.name == "quantize"), [])


def headline(report: Report) -> str:
    """What was made from what, in one line."""
    base = f"{report.recipe.base.repo_id}@{report.base.sha[:7]}" if report.base else report.recipe.base.repo_id
    if report.artifact is None:
        return f"{base}: nothing made"
    bits, group_size, _ = report.recipe.quantize.resolved
    return (
        f"{base} -> W{bits}A16 g{group_size}, {gigabytes(report.artifact.size)}, artifact {report.artifact.digest[:12]}"
    )


def published_words(published: Mapping[str, Any]) -> str:
    """What became of a release: `published` is its document."""
    if published["pull_request"]:
        return f"waits to be merged: {published['pull_request']}"
    return f"{'published' if published['changed'] else 'already published'}, tag {published['tag']}"


def stage_rows(report: Report) -> list[tuple[str, ...]]:
    return [(s.name, s.state, f"{s.seconds:.1f}", gigabytes(s.manifest.size)) for s in report.stages]


def gate_rows(gates: Iterable[Gate]) -> list[tuple[str, ...]]:
    return [
        (
            gate.name,
            "not measured" if gate.value is None else f"{gate.value:.4g}",
            "none" if gate.limit is None else f"{gate.limit:.4g}",
            "passed" if gate.passed else "FAILED",
            gate.note,
        )
        for gate in gates
    ]
