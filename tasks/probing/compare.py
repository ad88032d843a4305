"""The comparison of what two checkpoints made of the same questions, and its gates. All functions are pure.

An item is a question, or a group of questions that depend on each other, with the mean of their values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean

from pydantic import Field

from requant.tasks.documents import Document, StoredDocument
from requant.tasks.probing.outcome import MEASURES, Outcome, ProbeResult
from requant.tasks.probing.retrieval import length_of
from requant.tasks.validating.gates import Gate
from requant.tasks.validating.paired import compare_pairs

# Of the questions that the base answers well. Below this share it cannot do the task, or does it in a form that is not
# known here, so that a result has nothing to lose.
MIN_BASE_SHARE = 0.1
MARGIN = 0.05  # for `compare_pairs`; gates have the recipe's limit


class ProbeComparison(Document):
    """The comparison of both checkpoints in one measure. Shares are of 1, and those of the same questions."""

    measure: str = Field(description="What is measured")
    questions: int = Field(description="Questions that both answered")
    base: float | None = Field(description="Share that the base answers well; null if nothing was asked")
    ours: float | None = Field(description="Share that the result answers well")
    loss: float | None = Field(description="The base's share minus the result's")
    loss_interval: tuple[float, float] | None = Field(description="95 % interval of the loss")
    lost: int = Field(description="Questions that the base alone answers well")
    gained: int = Field(description="Questions that the result alone answers well")
    not_measured: str = Field(description="Why nothing, or not everything, was measured; empty if all was")


class ReasonCount(Document):
    """How often something is wrong with an answer."""

    set: str = Field(description="The set of questions")
    reason: str = Field(description="What is wrong")
    base: int = Field(description="Answers of the base")
    ours: int = Field(description="Answers of the result")


class LengthShare(Document):
    """The values that were found in texts of one length."""

    length: int = Field(description="Tokens of the texts")
    questions: int = Field(description="Values that both were asked for")
    base: int = Field(description="Values that the base found")
    ours: int = Field(description="Values that the result found")


class ProbeSummary(Document):
    """The comparison of both checkpoints: `probes` in the document of a run."""

    comparisons: tuple[ProbeComparison, ...] = Field(description="The measures that were asked for")
    reasons: tuple[ReasonCount, ...] = Field(description="What is wrong with answers of either")
    lengths: tuple[LengthShare, ...] = Field(description="The values found in texts of each length")


class ProbeDocument(StoredDocument):
    """What the probes measured of the base and of the result."""

    base: ProbeResult = Field(description="What the base made of the questions")
    ours: ProbeResult = Field(description="What the result made of them")

    @property
    def summary(self) -> ProbeSummary:
        """The comparison of both."""
        return ProbeSummary(
            comparisons=tuple(filter(None, (compare(self.base, self.ours, measure) for measure in MEASURES))),
            reasons=tuple(_reasons(self.base, self.ours)),
            lengths=tuple(_lengths(self.base, self.ours)),
        )


def compare(base: ProbeResult, ours: ProbeResult, measure: str) -> ProbeComparison | None:
    """Compare both checkpoints in one measure, on the questions that both answered; None if its set was not asked."""
    name = MEASURES[measure]
    if name not in base.sets or name not in ours.sets:
        return None
    of_base, of_ours = base.outcomes(measure), ours.outcomes(measure)
    pairs = [(of_base[question], of_ours[question]) for question in of_base if question in of_ours]
    why = ours.sets[name].not_measured or base.sets[name].not_measured
    if not pairs:
        return ProbeComparison(measure=measure, questions=0, base=None, ours=None, loss=None, loss_interval=None,
                               lost=0, gained=0, not_measured=why or "no question was answered by both")  # fmt: skip
    values = list(_values_of_groups(pairs, measure))
    compared = compare_pairs([one for one, _ in values], [other for _, other in values], MARGIN)
    flips = Counter((one.measures[measure], other.measures[measure]) for one, other in pairs)
    low, high = compared.interval
    return ProbeComparison(
        measure=measure,
        questions=len(pairs),
        base=fmean(one.measures[measure] for one, _ in pairs),
        ours=fmean(other.measures[measure] for _, other in pairs),
        loss=0.0 - compared.difference,  # not -0.0
        loss_interval=(max(-1.0, -high), min(1.0, -low)),
        lost=flips[True, False],
        gained=flips[False, True],
        not_measured=why,
    )


def _values_of_groups(pairs: list[tuple[Outcome, Outcome]], measure: str) -> Iterator[tuple[float, float]]:
    """Yield for each group of questions the share of good answers of both checkpoints."""
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for one, other in pairs:
        groups.setdefault(one.group, []).append((one.measures[measure], other.measures[measure]))
    for members in groups.values():
        yield fmean(one for one, _ in members), fmean(other for _, other in members)


def probe_gates(summary: ProbeSummary, limit: float | None) -> list[Gate]:
    """Judge each measure that was asked for.

    A gate fails if the whole interval of the loss is above the limit: the damage is certain. It passes if the whole
    interval is within the limit. Otherwise it cannot tell, which stops nothing.
    """
    return [_gate(one, limit) for one in summary.comparisons]


def unmeasured_gates(sets: Sequence[str], limit: float | None, why: str) -> list[Gate]:
    """Return the gates of sets that could not be asked."""
    return [Gate(measure, None, limit, None, why) for measure, name in MEASURES.items() if name in sets]


def _gate(one: ProbeComparison, limit: float | None) -> Gate:
    if one.loss is None or one.loss_interval is None or one.base is None or one.ours is None:
        return Gate(one.measure, None, limit, None, one.not_measured)
    if one.base < MIN_BASE_SHARE:
        why = f"the base itself answers {one.base:.0%} of {one.questions} questions well: nothing to lose"
        return Gate(one.measure, None, limit, None, why)
    low, high = one.loss_interval
    shares = f"{one.ours:.1%} of {one.questions} questions, the base {one.base:.1%}"
    note = f"between {low:.1%} and {high:.1%}: {shares}"
    if limit is None:
        return Gate(one.measure, one.loss, None, True, f"no limit asked for; {note}", one.loss_interval)
    if low <= limit < high:
        return Gate(one.measure, one.loss, limit, None, f"cannot tell: {note}", one.loss_interval)
    return Gate(one.measure, one.loss, limit, high <= limit, note, one.loss_interval)


def _reasons(base: ProbeResult, ours: ProbeResult) -> Iterator[ReasonCount]:
    """Count what is wrong with the answers of both, the most frequent of each set first."""
    for name in (one for one in base.sets if one in ours.sets):
        of_base, of_ours = (
            Counter(one.reason for one in result.sets[name].outcomes if one.reason) for result in (base, ours)
        )
        for reason, _ in (of_base + of_ours).most_common():
            yield ReasonCount(set=name, reason=reason, base=of_base[reason], ours=of_ours[reason])


def _lengths(base: ProbeResult, ours: ProbeResult) -> Iterator[LengthShare]:
    """Count the values that were found in texts of each length, the shortest first."""
    if not all("retrieval" in result.sets for result in (base, ours)):
        return
    of_base, of_ours = base.outcomes("retrieval"), ours.outcomes("retrieval")
    lengths: dict[int, list[str]] = {}
    for question in (one for one in of_base if one in of_ours):
        lengths.setdefault(length_of(of_base[question]), []).append(question)
    for length, questions in sorted(lengths.items()):
        found = [sum(side[one].measures["retrieval"] for one in questions) for side in (of_base, of_ours)]
        yield LengthShare(length=length, questions=len(questions), base=found[0], ours=found[1])
