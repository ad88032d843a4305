"""Calibration samples, taken from texts: how many from which source and domain, and from where in it."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from requant.tasks.errors import RecipeError
from requant.tasks.quantizing.events import JobRefused
from requant.tasks.quantizing.packing import Length, pack
from requant.tasks.texts.documents import Document, read_documents
from requant.tasks.texts.rows import read_rows

if TYPE_CHECKING:
    import torch

# How many times more tokens are read than the samples have, so that the samples come from more than a text's beginning
# while a large data set is not read to its end.
TOKENS_READ_PER_SAMPLE_TOKEN = 4
Tokens = list[int]


class SampleSource(BaseModel):
    """A text to take samples from, as the process that quantizes gets it.

    rendered: whether its file holds documents, as a text with chats does; mixed: whether its domains take turns;
    weight: see `Source` in the recipe; max_tokens: after how many tokens reading it ends, if it is not rendered: a
    rendered one has been read as far as is needed.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    paths: list[Path]
    rendered: bool = False
    mixed: bool = False
    weight: float | None = None
    field: str | None = None
    max_tokens: int | None = None


class SourceUse(BaseModel):
    """What was taken from a source: the rows and tokens that were read of it, and its samples by domain."""

    model_config = ConfigDict(frozen=True)

    rows: int
    tokens: int
    samples: dict[str, int]


@dataclass
class Supply:
    """What a source has: the lengths of its documents, by domain. All are of one domain, ``, unless it is mixed."""

    name: str
    weight: float | None = None
    lengths: dict[str, list[Length]] = field(default_factory=dict)

    def add(self, domain: str, length: Length) -> None:
        self.lengths.setdefault(domain, []).append(length)

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens each domain has."""
        return {domain: sum(length.tokens for length in lengths) for domain, lengths in self.lengths.items()}

    def room(self, seqlen: int, seed: int) -> dict[str, int]:
        """Return how many samples can be taken from each domain."""
        return {
            domain: len(pack(lengths, seqlen, seed)) if is_packed(lengths) else self.tokens[domain] // seqlen
            for domain, lengths in self.lengths.items()
        }


def is_packed(lengths: Iterable[Length]) -> bool:
    """Check whether a domain has chats, so that its samples are packed and not cut."""
    return any(length.chat for length in lengths)


def tokens_to_read(weights: Sequence[float | None], nsamples: int, seqlen: int) -> list[int]:
    """Return after how many tokens to stop reading each source, given their weights.

    Sources without weights also fill up for each other, so each is read for all samples at least.
    """
    if not any(weights):
        least = nsamples if len(weights) > 1 else 0
        counts = [max(least, TOKENS_READ_PER_SAMPLE_TOKEN * math.ceil(nsamples / len(weights)))] * len(weights)
    else:
        counts = [TOKENS_READ_PER_SAMPLE_TOKEN * max(1, count) for count in divide(nsamples, weights)]
    return [count * seqlen for count in counts]


def divide(nsamples: int, weights: Sequence[float | None]) -> list[int]:
    """Divide samples by weights, of which an absent one is 1. What rounding leaves goes to the largest remainders."""
    parts = [1.0 if weight is None else weight for weight in weights]
    exact = [nsamples * part / sum(parts) for part in parts]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda number: (counts[number] - exact[number], number))
    for number in by_remainder[: nsamples - sum(counts)]:
        counts[number] += 1
    return counts


def plan_samples(supplies: Sequence[Supply], nsamples: int, seqlen: int, seed: int) -> list[dict[str, int]]:
    """Return the number of samples to take from each domain of each source.

    With weights, each source gives its share. Without weights, every source gives the same number, or as many as it has
    room for. Within a source the same holds for its domains (`shares`). Raises RecipeError if there are too few tokens.
    """
    rooms = [supply.room(seqlen, seed) for supply in supplies]
    if len(supplies) == 1:
        return [shares(supplies[0].tokens, nsamples, seqlen, seed, rooms[0])]
    weights = [supply.weight for supply in supplies]
    totals = [sum(room.values()) for room in rooms]
    if any(weights):
        counts = divide(nsamples, weights)
        _check_weighted(supplies, totals, counts, seqlen)
    else:
        # Two local files may have one name, so the sources are told by their numbers too.
        labels = [f"{number}. {supply.name}" for number, supply in enumerate(supplies, 1)]
        tokens = {label: sum(supply.tokens.values()) for label, supply in zip(labels, supplies, strict=True)}
        found = shares(tokens, nsamples, seqlen, seed, dict(zip(labels, totals, strict=True)))
        counts = [found[label] for label in labels]
    return [
        shares(supply.tokens, count, seqlen, seed, room)
        for supply, count, room in zip(supplies, counts, rooms, strict=True)
    ]


def _check_weighted(supplies: Sequence[Supply], totals: Sequence[int], counts: Sequence[int], seqlen: int) -> None:
    """Raise RecipeError if a source with a weight has room for fewer samples than its share."""
    names = [one.name for one in supplies]
    for number, (supply, total, count) in enumerate(zip(supplies, totals, counts, strict=True), 1):
        if total >= count:
            continue
        weights = [one.weight for one in supplies]
        most = sum(counts) - 1
        while most and any(share > room for share, room in zip(divide(most, weights), totals, strict=True)):
            most -= 1
        tokens = sum(supply.tokens.values())
        fewer = f"set quantize.nsamples to at most {most}" if most else "lower quantize.seqlen"
        name = supply.name if names.count(supply.name) == 1 else f"{supply.name} (source {number})"
        raise RecipeError(
            f"{name} has {tokens:,} tokens and room for {total} of the {count} samples of {seqlen} that are its "
            f"share by weight: at least {(count - total) * seqlen:,} tokens are missing; {fewer}, give it a smaller "
            "weight, leave all weights out so that the other sources fill up, or name a longer text"
        )


def shares(
    tokens: Mapping[str, int], nsamples: int, seqlen: int, seed: int = 0, room: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the number of samples to take from each domain, given its number of tokens.

    Every domain gives the same number, or as many as it has room for: by default, all that can be cut of its tokens.
    With fewer samples than domains, `seed` decides which domains give one. Raises RecipeError if there are too few
    tokens.
    """
    room = room or {domain: count // seqlen for domain, count in tokens.items()}
    most = sum(room.values())
    if most < nsamples:
        whose = "; ".join(f"{domain} {count:,}" for domain, count in tokens.items()) if len(tokens) > 1 else ""
        fewer = (
            f"set quantize.nsamples to at most {most} (a preset brings its own)" if most else "lower quantize.seqlen"
        )
        raise RecipeError(
            f"the calibration text has {sum(tokens.values()):,} tokens{f' ({whose})' if whose else ''}, and {nsamples} "
            f"samples of {seqlen} need {nsamples * seqlen:,}; there is room for {most} of this length: {fewer}, or "
            "name a longer text as quantize.calibration: a Hub data set or a local file"
        )
    names = list(tokens)
    names = names[seed % len(names) :] + names[: seed % len(names)]
    counts = dict.fromkeys(names, 0)
    left = nsamples
    while left:
        for domain in names:
            if left and counts[domain] < room[domain]:
                counts[domain] += 1
                left -= 1
    return counts


def calibration_samples(
    tokenizer: Any, sources: Sequence[SampleSource], nsamples: int, seqlen: int, seed: int = 0
) -> tuple[list[torch.Tensor], list[SourceUse]]:
    """Take `nsamples` token tensors `[1, seqlen]` int64 from the sources. `seed` draws them where there is a choice.

    Also return what was taken from each source. Of a source without chats that is not mixed, samples are
    cut at even distances. Samples are never repeated or padded, and never overlap. Raises JobRefused if there are too
    few tokens.
    """
    import torch

    try:
        texts = [_TokenizedText(tokenizer, source) for source in sources]
        counts = plan_samples([text.supply for text in texts], nsamples, seqlen, seed)
    except RecipeError as error:
        raise JobRefused(str(error)) from error
    taken = [text.samples(count, seqlen, seed) for text, count in zip(texts, counts, strict=True)]
    uses = [text.use(count) for text, count in zip(texts, counts, strict=True)]
    return [torch.tensor([tokens]) for tokens in _take_turns(taken)], uses


def _take_turns(samples: Sequence[Sequence[Tokens]]) -> list[Tokens]:
    """Spread the samples of each source evenly over all samples."""
    placed = [((number + 0.5) / len(of_one), one) for of_one in samples for number, one in enumerate(of_one)]
    return [one for _, one in sorted(placed, key=lambda item: item[0])]


class _TokenizedText:
    """The documents of one source as tokens, by domain."""

    def __init__(self, tokenizer: Any, source: SampleSource) -> None:
        self._mixed = source.mixed
        self._documents: dict[str, list[Tokens]] = {}
        self.supply = Supply(source.name, source.weight)
        total = 0
        for document in documents_of(source):
            domain = document.domain if source.mixed else ""
            pieces = (
                [list(document.ids)]
                if document.ids
                else [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in document.pieces]
            )
            self._documents.setdefault(domain, []).append([token for piece in pieces for token in piece])
            length = Length(tuple(map(len, pieces)), document.chat)
            self.supply.add(domain, length)
            total += length.tokens
            if not source.rendered and source.max_tokens is not None and total >= source.max_tokens:
                break

    def samples(self, counts: Mapping[str, int], seqlen: int, seed: int) -> list[Tokens]:
        """Take samples from each domain. Those of a mixed text take turns over the domains."""
        starts: list[tuple[float, Tokens]] = []
        for domain, count in counts.items():
            taken = self._from_domain(domain, count, seqlen, seed)
            starts += [((number + 0.5) / count, sample) for number, sample in enumerate(taken)]
        return [sample for _, sample in sorted(starts, key=lambda item: item[0])]

    def use(self, counts: Mapping[str, int]) -> SourceUse:
        """Return what was taken, given the number of samples of each domain."""
        rows = sum(map(len, self._documents.values()))
        return SourceUse(rows=rows, tokens=sum(self.supply.tokens.values()), samples=dict(counts))

    def _from_domain(self, domain: str, count: int, seqlen: int, seed: int) -> list[Tokens]:
        if not count:
            return []
        documents, lengths = self._documents[domain], self.supply.lengths[domain]
        if is_packed(lengths):
            packed = pack(lengths, seqlen, seed)[:count]
            return [[token for part in sample for token in documents[part[0]][part[1] : part[2]]] for sample in packed]
        tokens = [token for document in documents for token in document]
        if self._mixed:
            draw = random.Random(f"{seed} {domain}")
            bounds = [len(tokens) * number // count for number in range(count + 1)]
            starts = [draw.randrange(bounds[n], bounds[n + 1] - seqlen + 1) for n in range(count)]
        else:
            stride = (len(tokens) - seqlen) // max(count - 1, 1)
            starts = [number * stride for number in range(count)]
        return [tokens[start : start + seqlen] for start in starts]


def documents_of(source: SampleSource) -> Iterator[Document]:
    """Yield the documents of a source, as far as they can be read without rendering. Raises RecipeError."""
    if source.rendered:
        for path in source.paths:
            yield from read_documents(path)
    else:
        for row in read_rows(source.paths, source.name, field=source.field):
            yield Document(row.text, (), row.domain)


def counting_every_sample(calib: Callable[..., None]) -> Callable[..., None]:
    """Wrap `MLLMCalibrator.calib` (auto-round 0.16.1, calibration/mllm.py) to count each entry of a list as one sample.

    auto-round counts an entry as a batch: it adds the batch size for each one, and stops at `nsamples`.
    """

    @functools.wraps(calib)
    def calib_with_all(self: Any, nsamples: int, bs: int) -> None:
        calib(self, nsamples, 1)

    return calib_with_all
