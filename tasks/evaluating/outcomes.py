"""The outcomes of one checkpoint in lm-eval's tasks: the score of each task, and the value of every item.

No text of a data set is kept: an item is the name of its task, its place in the data set, and the beginning of hashes
of its content and of its prompt, which show that two models read the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from requant.tasks.documents import StoredDocument
from requant.tasks.validating.measured import Number
from requant.tasks.validating.paired import Comparison, Scale, compare_pairs, look_sizes

HASH_LENGTH = 8  # hex digits: enough to see that a data set has changed, and nothing of its text
NUMBER = (int, float, np.number, np.bool_)
Sample = Mapping[str, Any]  # what lm-eval logs of one item
Samples = Mapping[str, Sequence[Sample]]  # by single task; a group has those of its members


class Score(StoredDocument):
    """The score of one checkpoint in one task."""

    metric: str = Field(description="lm-eval's name of the metric, with the filter of the answers if there is one")
    value: float = Field(description="The score, in the metric's own unit")
    stderr: float | None = Field(None, description="Its standard error; null if lm-eval gives none")
    samples: int | None = Field(None, description="Number of samples of the task")
    higher_is_better: bool = Field(True, description="False for metrics such as perplexity")


class Reading(StrEnum):
    """How lm-eval makes a score of the items' values. Source: lm_eval 0.4.13, api/metrics.py.

    The last three aggregate log-likelihoods in nats, and the last two have a weight for each: its words or its bytes.
    """

    MEAN = "mean"
    PERPLEXITY = "perplexity"
    WEIGHTED_PERPLEXITY = "weighted perplexity"
    BITS_PER_BYTE = "bits per byte"


class Items(StoredDocument):
    """The items of one task, or of all members of a group."""

    ids: tuple[str, ...] = Field(description="TASK/PLACE/HASHES of each item: of its content, and of its prompt")
    values: tuple[Number, ...] = Field(description="The metric's value of each item")
    weights: tuple[Number, ...] | None = Field(None, description="The weight of each item; null if all weigh alike")
    reading: Reading = Field(description="How they make the score")
    drawn_examples: bool = Field(
        False, description="Whether few-shot examples are drawn for one item after another: all are run, in order"
    )

    @classmethod
    def read(cls, ids: Sequence[str], logged: Sequence[Any], reading: Reading) -> Items | None:
        """Read what lm-eval logged of each item. Returns None if that is nothing which can be read like this."""
        weighted = reading in {Reading.WEIGHTED_PERPLEXITY, Reading.BITS_PER_BYTE}
        pairs = [value if weighted else (value, 1.0) for value in logged]
        if not pairs or not all(map(_is_weighted_number, pairs)):
            return None
        values, weights = (tuple(map(float, column)) for column in zip(*pairs, strict=True))
        return cls(ids=tuple(ids), values=values, weights=weights if weighted else None, reading=reading)

    def and_more(self, more: Items) -> Items:
        """Return these items and others of the same task."""
        weights = None if self.weights is None else (*self.weights, *(more.weights or ()))
        return Items(
            ids=(*self.ids, *more.ids), values=(*self.values, *more.values), weights=weights, reading=self.reading
        )

    def only(self, ids: Sequence[str]) -> Items:
        """Return the items with these ids, as far as they are here."""
        wanted = set(ids)
        kept = [place for place, item in enumerate(self.ids) if item in wanted]
        return Items(
            ids=tuple(self.ids[place] for place in kept),
            values=tuple(self.values[place] for place in kept),
            weights=None if self.weights is None else tuple(self.weights[place] for place in kept),
            reading=self.reading,
        )

    def scored_as(self, score: Score) -> Score:
        """Return the score of these items, in the metric of another one."""
        return score.model_copy(update={"value": self.score, "stderr": self.stderr, "samples": len(self.ids)})

    @property
    def places(self) -> dict[str, int]:
        """The place of each item in these lists, by its id."""
        return {item: place for place, item in enumerate(self.ids)}

    @property
    def is_perplexity(self) -> bool:
        """Whether the score is exp(-mean of the terms) and not their mean."""
        return self.reading in {Reading.PERPLEXITY, Reading.WEIGHTED_PERPLEXITY}

    @property
    def score(self) -> float:
        """The score of these items."""
        mean = float(self.terms().mean())
        return math.exp(min(-mean, 700.0)) if self.is_perplexity else mean

    @property
    def stderr(self) -> float | None:
        """The standard error of the score where that is a mean; None for perplexities and for single items."""
        if self.is_perplexity or len(self.ids) < 2:
            return None
        return float(self.terms().std(ddof=1) / math.sqrt(len(self.ids)))

    def terms(self, places: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Return one number for each item, or for those at some places, of which the mean makes the score."""
        chosen = slice(None) if places is None else np.array(places, dtype=np.int64)
        values = np.array(self.values, dtype=np.float64)[chosen]
        if self.weights is not None:
            values = values / np.array(self.weights, dtype=np.float64)[chosen].mean()
        return -values / math.log(2) if self.reading is Reading.BITS_PER_BYTE else values


class Outcomes(StoredDocument):
    """The outcomes of one checkpoint."""

    engine: str = Field(description="What ran the tasks, with its version")
    scores: dict[str, Score] = Field(description="The scores by task")
    items: dict[str, Items] = Field({}, description="The items by task; absent where the score is no mean of items")


def read_outcomes(results: Mapping[str, Any], engine: str) -> Outcomes:
    """Read lm-eval's results: the first metric of each entry, except of members of an aggregated group.

    Source: lm_eval 0.4.13, result_schema.py.
    """
    scores, items = {}, {}
    subtasks = results.get("group_subtasks", {})
    samples: Samples = results.get("samples") or {}
    for name, entry in results["results"].items():
        metrics = [key for key in entry if "," in key and "_stderr," not in key]
        values = [(key, entry[key]) for key in metrics if isinstance(entry[key], int | float)]
        if not values:
            continue
        (key, value), *_ = values
        metric, _, filter_name = key.partition(",")
        stderr = entry.get(f"{metric}_stderr,{filter_name}")
        scores[name] = Score(
            metric=metric if filter_name == "none" else f"{metric}, {filter_name}",
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            samples=entry.get("sample_len"),
            higher_is_better=bool(results["higher_is_better"].get(name, {}).get(metric, True)),
        )
        tasks = list(_single_tasks(name, subtasks))
        found = read_items(samples, tasks, scores[name])
        if found is not None:
            drawn = any(_draws_examples(results.get("configs", {}).get(task, {})) for task in tasks)
            items[name] = found.model_copy(update={"drawn_examples": True}) if drawn else found
    grouped = {member for group, members in subtasks.items() if group in scores for member in members}
    return Outcomes(
        engine=engine,
        scores={name: score for name, score in scores.items() if name not in grouped},
        items={name: found for name, found in items.items() if name not in grouped},
    )


def _draws_examples(config: Mapping[str, Any]) -> bool:
    """Check whether the few-shot examples of an item depend on the items before it.

    Every sampler but first_n draws from one running generator. Source: lm_eval 0.4.13, api/samplers.py.
    """
    sampler = (config.get("fewshot_config") or {}).get("sampler")
    return bool(config.get("num_fewshot")) and sampler != "first_n"


def _is_weighted_number(value: Any) -> bool:
    """Check whether a value that lm-eval logged is a number and its weight."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(part, NUMBER) for part in value)
        and value[1] > 0
    )


def _single_tasks(name: str, subtasks: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """Yield the single tasks of a group, or the task itself."""
    if not subtasks.get(name):
        yield name
    for member in subtasks.get(name, ()):
        yield from _single_tasks(member, subtasks)


def read_items(samples: Samples, tasks: Iterable[str], score: Score) -> Items | None:
    """Read the items of some tasks, for the metric of a score.

    Returns None unless they make the score: it is then one of a whole corpus, such as BLEU or F1, or lm-eval gives all
    members of a group one weight, whatever their sizes.
    """
    ids, values = logged_values(samples, tasks, score.metric)
    for reading in Reading if ids else ():
        found = Items.read(ids, values, reading)
        if found is not None and math.isclose(found.score, score.value, rel_tol=1e-6, abs_tol=1e-9):
            return found
    return None


def logged_values(samples: Samples, tasks: Iterable[str], metric: str) -> tuple[list[str], list[Any]]:
    """Return the ids of all items of some tasks, and what lm-eval logged as their values of a metric."""
    name, _, filter_name = metric.partition(", ")
    ids, values = [], []
    for task in tasks:
        for sample in samples.get(task, ()):
            if sample["filter"] == (filter_name or "none") and name in sample:
                hashes = f"{sample['doc_hash'][:HASH_LENGTH]}-{sample['prompt_hash'][:HASH_LENGTH]}"
                ids.append(f"{task}/{sample['doc_id']}/{hashes}")
                values.append(sample[name])
    return ids, values


def item_looks(base: Items) -> tuple[int, ...]:
    """Return after how many items of a base a run that may stop early looks at the comparison."""
    return (len(base.ids),) if base.drawn_examples else tuple(look_sizes(len(base.ids)))


def compare_items(
    base: Items, ours: Items, margin: float, *, higher_is_better: bool, early_stop: bool
) -> Comparison | None:
    """Compare a checkpoint with its base on the items that both did.

    The margin is a difference of the score if that is between 0 and 1, and for perplexities of their logarithm, which
    is a share of the perplexity; for other scores it is a share of the base's. `early_stop`: the run could stop before
    the last item, so that the interval is wider. Returns None if both did no item, or a value is not finite.
    """
    ours_at, base_at = ours.places, base.places
    common = [item for item in base.ids if item in ours_at]
    if not common:
        return None
    of_base = base.terms([base_at[item] for item in common])
    of_ours = ours.terms([ours_at[item] for item in common])
    scale = Scale.LOG_LIKELIHOOD if base.is_perplexity else Scale.SCORE if higher_is_better else Scale.LOSS
    bounded = all(terms.min() >= 0 and terms.max() <= 1 for terms in (of_base, of_ours))
    if not bounded and scale is not Scale.LOG_LIKELIHOOD:
        margin *= abs(float(of_base.mean()))
    looks = len(item_looks(base)) if early_stop else 1
    try:
        return compare_pairs(of_base, of_ours, margin, scale=scale, looks=looks)
    except ValueError:  # A value is not finite, or the base scores 0 on a scale without end, and there is no margin.
        return None
