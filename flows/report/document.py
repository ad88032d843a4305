"""The document of `requant run --json`, which `requant.run` returns as an object.

Its keys are a contract with users.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from requant.tasks.documents import Document, first_problem, is_none
from requant.tasks.errors import RequantError
from requant.tasks.hub.release import Release
from requant.tasks.probing.compare import ProbeSummary
from requant.tasks.redaction import without_non_finite
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.validating.drafts import DraftComparison
from requant.tasks.validating.gates import Gate
from requant.tasks.validating.measured import Measured

Status = Literal["published", "validated", "rejected", "failed"]


class RunPart(Document):
    """A part of the document. Keys that a later version wrote are ignored."""

    model_config = ConfigDict(extra="ignore")


class RunBase(RunPart):
    """The base."""

    repo_id: str = Field(description="Its repo on the Hub, or the name of its folder")
    sha: str | None = Field(
        description="Its commit, of a folder a digest of its files; null if the run did not come to it"
    )
    adapter: str | None = Field(
        None, exclude_if=is_none, description="The adapter that is merged into it, at its commit; otherwise absent"
    )


class RunArtifact(RunPart):
    """The result's files."""

    digest: str | None = Field(description="Digest of the artifact in the store; null if none was made")
    path: str | None = Field(description="A folder with the files, with --checkout or a local store; otherwise null")


class RunStage(RunPart):
    """A stage that has ended."""

    name: str = Field(description="The stage, or the output and the stage")
    state: Literal["ran", "reused"] = Field(description="reused: its artifact was in the store")
    seconds: float = Field(description="How long it took")


class RunDocument(RunPart):
    """What a run made and measured, as far as it came.

    For a recipe with several outputs, `outputs` has a document of each, and what only one result can have is null. In
    JSON, `stages` and `gates` then have the rows of all outputs, each with the key `output`.
    """

    name: str | None = Field(None, exclude_if=is_none, description="Name of an output in `outputs`")
    status: Status = Field(
        description="published; validated: there is nothing to publish, or it waits in a pull request; rejected: a "
        "gate failed; failed: see `error`"
    )
    base: RunBase = Field(description="The base")
    artifact: RunArtifact = Field(description="The result")
    stages: tuple[RunStage, ...] = Field(description="The stages that have ended, in their order")
    gates: tuple[Gate, ...] = Field(description="The gates, as in the document of `requant validate`")
    benchmark: BenchmarkResult | None = Field(
        description="The document of `requant bench`; null if the run did not come to it"
    )
    published: Release | None = Field(description="The release on the Hub; null if nothing was published")
    measured: (
        Annotated[
            Measured,
            BeforeValidator(lambda value: Measured.from_json(value) if isinstance(value, Mapping) else value),
            PlainSerializer(lambda measured: without_non_finite(measured.to_json()), return_type=dict[str, Any]),
        ]
        | None
    ) = Field(description="All values that were measured, under flat keys; null if the run did not come to it")
    drafts: DraftComparison | None = Field(
        None, description="The drafts of the result and of the base, counted in one engine; null where they were not"
    )
    probes: ProbeSummary | None = Field(
        None, description="Base and result compared by the recipe's probes; null without probes, or if not measured"
    )
    error: str | None = Field(description="Why the run failed, in one sentence; otherwise null")
    outputs: tuple[RunDocument, ...] | None = Field(
        None, exclude_if=is_none, description="Only for a recipe with outputs: a document for each that was begun"
    )

    def to_json(self) -> dict[str, Any]:
        """Return the document as `json.dumps` takes it. JSON has no NaN: a value that is not finite is null."""
        document = super().to_json()
        for key in ("stages", "gates") if self.outputs is not None else ():
            document[key] = [{"output": one["name"], **row} for one in document["outputs"] for row in one[key]]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunDocument:
        """Read what `to_json` returned, in this version or another. Raises RequantError if that is not possible."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            place, problem = first_problem(error)
            raise RequantError(
                f"the document of requant run is not readable ({place}: {problem}): "
                "use the version of Requant that wrote it"
            ) from error
