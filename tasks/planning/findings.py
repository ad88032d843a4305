"""What a plan found wrong beside the base and the result: with the machine, the engine, the tasks, or the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Findings:
    """Sentences. `problems` would stop a run. `warnings` may stop it or make it slow, or say what was not checked."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        return Findings(self.problems + other.problems, self.warnings + other.warnings)

    @classmethod
    def of(cls, stage: str, problems: Iterable[str] = (), warnings: Iterable[str] = ()) -> Findings:
        """Put the name of the stage that is affected in front of each sentence."""
        return cls(tuple(f"{stage}: {one}" for one in problems), tuple(f"{stage}: {one}" for one in warnings))
