"""Finds tensors that a checkpoint must have and lacks, by their names and shapes alone.

An engine allocates a parameter for which it finds no tensor and leaves it as it is: vLLM 0.32.0 starts with
uninitialized memory if the checkpoint is quantized (model_loader/default_loader.py checks only the others), and
transformers 5.23.0 with random numbers.

What an architecture needs is data, one file for each class, which `python -m infra.dev.architectures` writes from the
pinned transformers: `needs` reads it and `needed` compares. Where an architecture is not known, `siblings` looks at
what the checkpoint says of itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.completeness.names import Stored, without_leading
from requant.tasks.checkpoint.completeness.needed import Comparison, Lack
from requant.tasks.checkpoint.completeness.needs import Needs
from requant.tasks.checkpoint.completeness.siblings import lost_tensors
from requant.tasks.checkpoint.heads.drafters import drafter_kind


@dataclass(frozen=True)
class Completeness:
    """What a checkpoint lacks. `architecture`: the class that it was compared with; None if none is known."""

    architecture: str | None
    lacks: list[Lack]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Completeness:
        """Compare a checkpoint with its architecture or, where that is not known, its layers with each other.

        Nothing is said of a draft model, which may share ends and layers with the model that it drafts for.
        """
        if drafter_kind(checkpoint.config) is not None:
            return cls(None, [])
        stored = Stored.of(checkpoint)
        needs = Needs.of(checkpoint.config)
        if needs is not None:
            return cls(needs.architecture, Comparison(needs, needs.values(checkpoint.config), stored).lacks())
        head = checkpoint.head.names if checkpoint.head else ()
        return cls(None, [Lack(n) for n in lost_tensors(stored, checkpoint.config, map(without_leading, head))])

    @property
    def complete(self) -> bool | None:
        """Whether nothing is missing; None if nothing was found and the architecture is not known."""
        return False if self.lacks else None if self.architecture is None else True


def missing_tensors(checkpoint: Checkpoint) -> list[str] | None:
    """Return the names of tensors that are missing; None if none are found and the architecture is not known."""
    completeness = checkpoint.completeness
    names = [lack.name for lack in completeness.lacks if lack.there is None]
    return None if not names and completeness.architecture is None else names
