"""Answers of checkpoints to items of lm-eval's tasks, without lm-eval and models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.tasks.evaluating.outcomes import Outcomes, Samples, read_outcomes
from requant.tasks.evaluating.rounds import Wanted

Right = NDArray[np.bool_]  # for each item of a task whether it is answered rightly
ITEMS = 3200


class Answers:
    """What a checkpoint answers to the items of some tasks, as lm-eval logs it; counts what was asked."""

    def __init__(self, right: Mapping[str, Right]) -> None:
        self.right, self.asked = right, list[Wanted]()

    def __call__(self, wanted: Wanted) -> Samples:
        self.asked.append(wanted)
        return {task: [self._sample(task, place) for place in places] for task, places in wanted.items()}

    def _sample(self, task: str, place: int) -> dict[str, Any]:
        content = hashlib.sha256(f"{task} {place}".encode()).hexdigest()
        hashes = {"doc_hash": content, "prompt_hash": content[::-1]}
        return {"doc_id": place, **hashes, "filter": "none", "acc": float(self.right[task][place])}

    def outcomes(self, group: str = "", **config: Any) -> Outcomes:
        """All items, as a run without rounds has them; of all tasks together if they are a group.

        `config` is that of each task.
        """
        samples = self({task: range(len(right)) for task, right in self.right.items()})
        means = {task: float(right.mean()) for task, right in self.right.items()}
        results = {task: {"acc,none": mean} for task, mean in means.items()}
        subtasks = {group: list(self.right)} if group else {}
        if group:
            results[group] = {"acc,none": float(np.concatenate(list(self.right.values())).mean())}
        document = {"results": results, "higher_is_better": {}, "group_subtasks": subtasks, "samples": samples}
        document["configs"] = dict.fromkeys(self.right, config)
        return read_outcomes(document, "x 1")


def right(share: float = 0.7, items: int = ITEMS, seed: int = 0) -> Right:
    return np.random.default_rng(seed).random(items) < share


def flip(values: Right, lost: float, gained: float, seed: int = 1) -> Right:
    """Lose a share of all items, and gain one."""
    drawn = np.random.default_rng(seed).random(len(values))
    return np.where(values, drawn >= lost / values.mean(), drawn < gained / (1 - values.mean()))
