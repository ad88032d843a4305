"""Calibration samples, cut from texts."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.tasks.errors import RecipeError
from requant.tasks.quantizing.events import JobRefused
from requant.tasks.texts.rows import read_rows

if TYPE_CHECKING:
    import torch

# How many times more tokens are read than the samples have, so that the samples come from more than a text's beginning
# while a large data set is not read to its end.
TOKENS_READ_PER_SAMPLE_TOKEN = 4


def max_tokens_read(nsamples: int, seqlen: int, *, mixed: bool) -> int | None:
    """Return after how many tokens to stop reading a text; None for a mixed one, whose last domain is needed too."""
    return None if mixed else TOKENS_READ_PER_SAMPLE_TOKEN * nsamples * seqlen


def calibration_samples(
    tokenizer: Any, texts: Sequence[str | Path], nsamples: int, seqlen: int, *, mixed: bool = False, seed: int = 0
) -> list[torch.Tensor]:
    """Cut `nsamples` token tensors `[1, seqlen]` int64 at even distances from the texts, read one after another.

    If the text is `mixed`, the domains of its rows take turns, and `seed` decides where in a domain a sample begins.

    Raises JobRefused if the texts have too few tokens: samples are never repeated or padded, and never overlap.
    """
    import torch

    max_tokens = max_tokens_read(nsamples, seqlen, mixed=mixed)
    ids: dict[str, list[int]] = {}
    try:
        for row in read_rows(texts, "the calibration text"):
            tokens = ids.setdefault(row.domain if mixed else "", [])
            tokens += tokenizer(row.text, add_special_tokens=False)["input_ids"]
            if max_tokens is not None and len(tokens) >= max_tokens:
                break
        counts = shares({domain: len(tokens) for domain, tokens in ids.items()}, nsamples, seqlen, seed)
    except RecipeError as error:
        raise JobRefused(str(error)) from error
    if mixed:
        starts = _starts(ids, counts, seqlen, seed)
        return [torch.tensor([ids[domain][start : start + seqlen]]) for domain, start in starts]
    (all_ids,) = ids.values()
    stride = (len(all_ids) - seqlen) // max(nsamples - 1, 1)
    return [torch.tensor([all_ids[i * stride : i * stride + seqlen]]) for i in range(nsamples)]


def shares(tokens: Mapping[str, int], nsamples: int, seqlen: int, seed: int = 0) -> dict[str, int]:
    """Return the number of samples to take from each domain, given its number of tokens.

    Every domain gives the same number, or as many as it has tokens for. With fewer samples than domains, `seed` decides
    which domains give one. Raises RecipeError if there are too few tokens.
    """
    room = {domain: count // seqlen for domain, count in tokens.items()}
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


def _starts(ids: Mapping[str, list[int]], counts: Mapping[str, int], seqlen: int, seed: int) -> list[tuple[str, int]]:
    """Draw the domain and the first token of each sample, in the order of the samples.

    The tokens of a domain are cut into as many equal parts as it gives samples, and one sample begins in each part.
    """
    starts: list[tuple[float, str, int]] = []
    for domain, count in counts.items():
        draw = random.Random(f"{seed} {domain}")
        for number in range(count):
            begin, end = (len(ids[domain]) * n // count for n in (number, number + 1))
            starts.append(((number + 0.5) / count, domain, draw.randrange(begin, end - seqlen + 1)))
    return [(domain, start) for _, domain, start in sorted(starts, key=lambda item: item[0])]


def counting_every_sample(calib: Callable[..., None]) -> Callable[..., None]:
    """Wrap `MLLMCalibrator.calib` (auto-round 0.16.1, calibration/mllm.py) to count each entry of a list as one sample.

    auto-round counts an entry as a batch: it adds the batch size for each one, and stops at `nsamples`.
    """

    @functools.wraps(calib)
    def calib_with_all(self: Any, nsamples: int, bs: int) -> None:
        calib(self, nsamples, 1)

    return calib_with_all
