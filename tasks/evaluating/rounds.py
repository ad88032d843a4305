"""Run the result's items in rounds, and each task only until its comparison with the base is decided.

The base has done all items, and the store keeps them. The result does them in an order that is shuffled with a fixed
seed, so that every beginning of it is a fair sample. Where lm-eval draws the few-shot examples of one item after
another, other items before an item would give it another prompt: such a task is one round, in its own order.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from requant.tasks.errors import EvaluationFailed
from requant.tasks.evaluating.outcomes import Items, Outcomes, Samples, Score, compare_items, item_looks, logged_values
from requant.tasks.validating.paired import Verdict

SEED = 1234  # of the order of the items
Wanted = Mapping[str, Sequence[int]]  # places of items in the data set, by single task
log = logging.getLogger(__name__)


def run_in_rounds(base: Outcomes, margin: float, engine: str, answer: Callable[[Wanted], Samples]) -> Outcomes:
    """Run the tasks of a base, whose scores must all have items, until each is decided or all of its items are done.

    `answer` runs some items. `margin` is that of `compare_items`. Raises EvaluationFailed if an answer lacks values.
    """
    tasks = [_Task.begin(name, base) for name in base.scores]
    while wanted := [id_ for task in tasks for id_ in task.next_ids()]:
        samples = answer(_places(wanted))
        for task in tasks:
            task.take(samples, margin)
    return Outcomes(
        engine=engine,
        scores={task.name: task.score for task in tasks},
        items={task.name: task.items for task in tasks if task.items is not None},
    )


@dataclass
class _Task:
    """One task, or a group of them, in the middle of its rounds."""

    name: str
    base: Items
    base_score: Score
    order: list[str]  # ids of all items
    asked: int = 0  # items so far
    items: Items | None = None  # what was done
    decided: bool = False

    @classmethod
    def begin(cls, name: str, base: Outcomes) -> _Task:
        """Shuffle the items of a task. The order depends on nothing but their ids."""
        order = sorted(base.items[name].ids)
        random.Random(SEED).shuffle(order)
        return cls(name, base.items[name], base.scores[name], order)

    def next_ids(self) -> list[str]:
        """Return the items up to the next look; none if the comparison is decided."""
        sizes = () if self.decided else item_looks(self.base)
        return self.order[self.asked : next((size for size in sizes if size > self.asked), self.asked)]

    def take(self, samples: Samples, margin: float) -> None:
        """Take the values of a round, and look whether all values so far decide."""
        asked = self.next_ids()
        if not asked:
            return
        ids, values = logged_values(samples, sorted({_single_task(id_) for id_ in asked}), self.base_score.metric)
        found = Items.read(ids, values, self.base.reading)
        if found is None or len(ids) != len(asked):
            raise EvaluationFailed(
                f"lm-eval logged {len(ids)} values of {self.base_score.metric} for {len(asked)} items of {self.name}"
            )
        self.items = found if self.items is None else self.items.and_more(found)
        self.asked += len(asked)
        higher_is_better = self.base_score.higher_is_better
        result = compare_items(self.base, self.items, margin, higher_is_better=higher_is_better, early_stop=True)
        self.decided = result is not None and result.verdict is not Verdict.CANNOT_TELL
        word = result.verdict if result else "no pairs"
        log.info(f"{self.name}: {word} after {self.asked} of {len(self.order)} items")

    @property
    def score(self) -> Score:
        """The score of the items that were done."""
        assert self.items is not None  # There is no score without items, and the first round asks for some.
        return self.items.scored_as(self.base_score)


def _single_task(id_: str) -> str:
    return id_.rsplit("/", 2)[0]


def _places(ids: Sequence[str]) -> Wanted:
    """Group items by their single task. The places are in order, as lm-eval needs them."""
    places = defaultdict[str, list[int]](list)
    for id_ in ids:
        task, place, _ = id_.rsplit("/", 2)
        places[task].append(int(place))
    return {task: sorted(found) for task, found in places.items()}
