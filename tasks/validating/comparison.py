"""The document of a comparison of two checkpoints of one base (`tasks/compare.py`). It needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from requant.tasks.documents import Document, Value

Answer = Literal["a", "b", "no difference"]
OverallAnswer = Answer | Literal["mixed"]


class Difference(Document):
    """The difference of one value between A and B. It is above 0 where A is better."""

    a: Value = Field(description="The value of A")
    b: Value = Field(description="The value of B")
    difference: Value = Field(
        description="Of KL divergences: by which share of the larger one that of A is smaller; of rates: A's minus B's"
    )
    interval: tuple[Value, Value] | None = Field(
        description="Its interval, seeds included; all of a document hold together at 95 %; null with few windows"
    )
    answer: Answer | None = Field(description="Which one is better, if that is real; null: not judged")


class DomainComparison(Document):
    """Both checkpoints on one domain of the text."""

    tokens: int = Field(description="Number of tokens")
    kl_divergence: Difference = Field(description="Mean KL(base || checkpoint) of the next token, in nats")
    perplexity: tuple[Value, Value] = Field(description="Perplexity per token of A and of B")
    top1_agreement: tuple[Value, Value] = Field(description="Share of places at which A and B choose the base's token")
    mtp_acceptance: Difference | None = Field(
        description="Draft acceptance rate; null unless both have an MTP head that torch can run, and finite losses"
    )


class ComparisonDocument(Document):
    """The document of `requant compare`."""

    a: str = Field(description="The first checkpoint")
    b: str = Field(description="The second checkpoint")
    base: str = Field(description="The base of both")
    text: str = Field(description="The name of the text")
    answer: OverallAnswer | None = Field(
        description="Which one is better where there is a real difference; mixed: each is somewhere; null: not judged"
    )
    domains: dict[str, DomainComparison] = Field(description="The comparison by domain of the text")

    @property
    def better_in(self) -> dict[Answer, list[str]]:
        """The domains by answer, in their order; one with two answers is in both lists."""
        found: dict[Answer, list[str]] = {"a": [], "b": [], "no difference": []}
        for name, row in self.domains.items():
            answers = {part.answer for part in (row.kl_divergence, row.mtp_acceptance) if part and part.answer}
            for answer in (answers - {"no difference"}) or answers:
                found[answer].append(name)
        return found
