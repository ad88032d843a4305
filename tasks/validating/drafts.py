"""Counts of an engine's drafts, as the store keeps them, and their comparison with the base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from requant.tasks.documents import StoredDocument
from requant.tasks.validating.ratio import Ratio, compare_rates, rate

MAX_DRAFTED_TOKENS = 100_000  # Of one checkpoint, no more are counted.


@dataclass(frozen=True)
class EngineSetup:
    """What runs an engine: two checkpoints are compared in one setup only. None where it is not known."""

    version: str | None = None
    hardware: str | None = None

    def __str__(self) -> str:
        return f"{self.version} on {self.hardware}" if self.version else "a server that ran already"


class DraftCount(StoredDocument):
    """What an engine counted of one checkpoint's drafts. Batches with the same index have the same places."""

    drafted: tuple[int, ...] = Field(description="Drafted tokens of each batch of places")
    accepted: tuple[int, ...] = Field(description="Accepted tokens of each batch")
    version: str | None = Field(None, description="The engine and its version; null for a server that ran already")
    hardware: str | None = Field(None, description="The GPUs by name, or the CPU; null for a server that ran already")

    @property
    def batches(self) -> list[tuple[int, int]]:
        """Drafted and accepted tokens of each batch."""
        return list(zip(self.drafted, self.accepted, strict=True))

    @property
    def tokens(self) -> int:
        """The number of drafted tokens."""
        return sum(self.drafted)

    @property
    def rate(self) -> float | None:
        """The draft acceptance rate; None if nothing was drafted."""
        return rate(self.batches)

    @property
    def setup(self) -> EngineSetup:
        return EngineSetup(self.version, self.hardware)

    @model_validator(mode="after")
    def batches_have_both_counts(self) -> Self:
        if len(self.drafted) != len(self.accepted):
            raise ValueError(f"{len(self.drafted)} batches drafted, and {len(self.accepted)} accepted")
        return self


class DraftComparison(StoredDocument):
    """The drafts of a quantized checkpoint and of its base, counted in one engine at the same places of one text."""

    text: str = Field(description="The name of the text")
    quantized: DraftCount = Field(description="The drafts of the quantized checkpoint")
    base: DraftCount = Field(description="The drafts of the base")

    @property
    def ratio(self) -> Ratio | None:
        """The draft acceptance rate divided by the base's; None where the ratio is undefined."""
        return compare_rates(self.quantized.batches, self.base.batches)
