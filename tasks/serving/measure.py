"""Measuring the speed of a server: each prompt greedy and sampled, one request at a time and several."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Sequence

from requant.tasks.progress import progress
from requant.tasks.serving.client import SAMPLING, Server, ask
from requant.tasks.serving.prompts import Prompt
from requant.tasks.serving.result import PromptResult, TokenGaps

log = logging.getLogger(__name__)

WARM_UP_TOKENS = 32


def measure_speed(server: Server, prompts: Sequence[Prompt], concurrency: int, mtp: bool | None) -> list[PromptResult]:
    """Measure each prompt with each way of sampling, one request at a time and `concurrency` requests at once.

    `mtp` says whether the server drafts with the MTP head; None: its counters tell. Raises EngineFailed.
    """
    concurrencies = sorted({1, concurrency})
    first = prompts[0]
    warm_up = Prompt(first.set, "warm-up", first.text, first.chat, min(WARM_UP_TOKENS, first.tokens))
    for times in concurrencies:  # an engine compiles kernels for a batch size when it first needs them
        ask(server, warm_up, "greedy", times)
    rows = []
    with progress("benchmark", len(prompts) * len(SAMPLING) * sum(concurrencies), "requests") as bar:
        for prompt, sampling, times in itertools.product(prompts, SAMPLING, concurrencies):
            row = _measure_prompt(server, prompt, sampling, times, mtp)
            rows.append(row)
            bar.advance(times)
            log.info(_log_line(row))
    return rows


def _measure_prompt(server: Server, prompt: Prompt, sampling: str, times: int, mtp: bool | None) -> PromptResult:
    """Measure a prompt. Tokens per second are the output tokens of all requests over the time they took together."""
    answers, counters = ask(server, prompt, sampling, times)
    seconds = max(answer.pieces[-1][0] for answer in answers) - min(answer.sent_s for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    gaps_s = sorted(gap_s for answer in answers for gap_s in answer.gaps_s)
    return PromptResult(
        set=prompt.set,
        name=prompt.name,
        mtp=counters.drafts > 0 if mtp is None else mtp,
        sampling=sampling,
        concurrency=times,
        tokens=tokens,
        tokens_per_second=round(tokens / max(seconds, 1e-9), 3),
        first_token_seconds=round(statistics.median(answer.first_token_s for answer in answers), 5),
        inter_token_seconds=TokenGaps(median=_quantile(gaps_s, 0.5), p99=_quantile(gaps_s, 0.99)),
        drafted_tokens=int(counters.drafted),
        accepted_tokens=int(counters.accepted),
        acceptance=counters.acceptance,
        acceptance_by_position=tuple(counters.acceptance_by_position),
    )


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """Return the smallest value that at least `share` of the ordered values do not exceed; None if there are none."""
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6)


def _log_line(row: PromptResult) -> str:
    drafted = "" if row.acceptance is None else f", draft acceptance rate {row.acceptance:.1%}"
    at_once = "" if row.concurrency == 1 else f" x {row.concurrency}"
    return f"{row.set}/{row.name}, {row.sampling}{at_once}: {row.tokens_per_second:.1f} tokens/s{drafted}"
