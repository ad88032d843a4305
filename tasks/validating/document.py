"""The document of `requant validate`: the gates of a checkpoint that was measured without an engine."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainSerializer

from requant.tasks.documents import Document
from requant.tasks.recipe.recipe import Gates
from requant.tasks.redaction import without_non_finite
from requant.tasks.validating.engine_gate import judge_engine
from requant.tasks.validating.gates import Gate, accepted, judge
from requant.tasks.validating.measured import DomainValues, Measured


def _without_non_finite(domains: dict[str, DomainValues] | None) -> Any:
    return without_non_finite({name: values.to_json() for name, values in domains.items()}) if domains else None


class ValidationDocument(Document):
    """The document of `requant validate --json`."""

    gates: tuple[Gate, ...] = Field(description="All gates that apply to the checkpoint")
    passed: bool = Field(description="Whether no gate failed and a value of the model's quality was measured")
    findings: tuple[str, ...] = Field(
        description="Differences from the base that change nothing that is computed, and what engines compute and this "
        "does not"
    )
    domains: Annotated[
        dict[str, DomainValues] | None,
        PlainSerializer(_without_non_finite, return_type=dict[str, Any] | None),  # JSON has no NaN
        Field(description="The comparison by domain of the text; null if the checkpoint could not be compared"),
    ] = None

    @classmethod
    def of(cls, measured: Measured, gates: Gates) -> ValidationDocument:
        """Judge measured values by the limits of a recipe."""
        results = (*judge(measured, gates), *judge_engine(measured, gates, None))
        return cls(
            gates=results,
            passed=accepted(results),
            findings=(*measured.audit.differences, *filter(None, [measured.not_computed])),
            domains=measured.divergence.domains,
        )
