"""What a checkpoint made of the questions: the stage's artifact. Neither questions nor answers are kept in it."""

from __future__ import annotations

from pydantic import Field

from requant.tasks.documents import StoredDocument
from requant.tasks.validating.drafts import EngineSetup

# What is measured of an answer, each true or false, and in which set. Gates have the same names.
MEASURES = {
    "tool_calls_valid": "tools",
    "tool_calls_right": "tools",
    "answers_finished": "answers",
    "answers_without_loop": "answers",
    "retrieval": "retrieval",
}


class Outcome(StoredDocument):
    """What was measured of one answer."""

    question: str = Field(description="Name of the question in its set")
    group: str = Field(description="Questions of one group are not independent of each other")
    measures: dict[str, bool] = Field(description="What was measured, and whether the answer is good in it")
    reason: str = Field("", description="What is wrong with the answer; empty if nothing is")


class ProbeSet(StoredDocument):
    """The answers to one set of questions."""

    outcomes: tuple[Outcome, ...] = Field((), description="One for each question that was asked")
    not_measured: str = Field("", description="Why the set, or a part of it, was not asked")


class ProbeResult(StoredDocument):
    """What one checkpoint made of all sets."""

    sets: dict[str, ProbeSet] = Field(description="The sets by name")
    version: str = Field("", description="The engine")
    hardware: str = Field("", description="What it ran on")
    seconds: float = Field(0.0, description="How long the questions took")

    @property
    def setup(self) -> EngineSetup:
        return EngineSetup(self.version, self.hardware)

    def outcomes(self, measure: str) -> dict[str, Outcome]:
        """Return the outcomes that have this measure, by question."""
        answered = self.sets[MEASURES[measure]].outcomes
        return {outcome.question: outcome for outcome in answered if measure in outcome.measures}
