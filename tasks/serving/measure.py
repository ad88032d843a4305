"""Measuring a server: each prompt, greedy and sampled, alone and several at once; and what sums it up."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from requant.tasks.serving.client import SAMPLING, Server, ask
from requant.tasks.serving.metrics import Drafts
from requant.tasks.serving.prompts import Prompt

log = logging.getLogger(__name__)

WARM_UP = 32  # tokens


def measure_speed(
    server: Server, prompts: Sequence[Prompt], concurrency: int, mtp: bool | None
) -> list[dict[str, Any]]:
    """A row for each prompt, way of sampling and number of requests at once (1 and `concurrency`).

    `mtp` says whether the server drafts; None: nobody knows, and its counters decide. Raises EngineFailed.
    """
    for times in sorted({1, concurrency}):  # kernels are compiled for a batch when it first comes
        first = prompts[0]
        ask(server, Prompt(first.set, "warm-up", first.text, first.chat, min(WARM_UP, first.tokens)), "greedy", times)
    rows = []
    cases = [(s, times) for s in SAMPLING for times in sorted({1, concurrency})]
    for prompt in prompts:
        for sampling, times in cases:
            row = measure_one(server, prompt, sampling, times, mtp)
            rows.append(row)
            log.info(_line(row))
    return rows


def measure_one(server: Server, prompt: Prompt, sampling: str, times: int, mtp: bool | None) -> dict[str, Any]:
    """One row. Output tokens per second are those of all requests over the time that all took together."""
    began = time.perf_counter()
    answers, drafted = ask(server, prompt, sampling, times)
    last = max(answer.pieces[-1][0] for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    gaps = sorted(gap for answer in answers for gap in answer.gaps)
    started = min((answer.asked for answer in answers), default=began)
    return {
        "set": prompt.set,
        "name": prompt.name,
        "mtp": drafted.drafts > 0 if mtp is None else mtp,
        "sampling": sampling,
        "concurrency": times,
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(last - started, 1e-9), 3),
        "first_token_seconds": round(statistics.median(answer.first for answer in answers), 5),
        "inter_token_seconds": {"median": _quantile(gaps, 0.5), "p99": _quantile(gaps, 0.99)},
        **_drafts(drafted),
    }


def _drafts(drafted: Drafts) -> dict[str, Any]:
    return {
        "drafted_tokens": int(drafted.drafted),
        "accepted_tokens": int(drafted.accepted),
        "acceptance": drafted.acceptance,
        "acceptance_by_position": drafted.acceptance_by_position,
    }


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed."""
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6)


def summary(
    rows: Iterable[Mapping[str, Any]], *, mtp: bool, sampling: str = "greedy", concurrency: int = 1
) -> dict[str, Any] | None:
    """What rows with or without MTP say together, by default greedy and one at a time; None where there are none.

    Tokens per second are all tokens over all time, so that a long answer counts as what it is.
    """
    wanted = (mtp, sampling, concurrency)
    chosen = [r for r in rows if (r["mtp"], r["sampling"], r["concurrency"]) == wanted]
    if not chosen:
        return None
    tokens = sum(r["tokens"] for r in chosen)
    seconds = sum(r["tokens"] / r["tokens_per_second"] for r in chosen)
    drafted = sum(r.get("drafted_tokens", 0) for r in chosen)
    accepted = sum(r.get("accepted_tokens", 0) for r in chosen)
    middle = [r["inter_token_seconds"]["median"] for r in chosen if r["inter_token_seconds"]["median"] is not None]
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 3),
        "first_token_seconds": round(statistics.median(r["first_token_seconds"] for r in chosen), 5),
        "inter_token_seconds": round(statistics.median(middle), 6) if middle else None,
        "acceptance": round(accepted / drafted, 4) if drafted else None,
    }


def summarized(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A benchmark's rows and what they say: one speed and acceptance, with MTP if there was any, and MTP on and off."""
    on, off = summary(rows, mtp=True), summary(rows, mtp=False)
    speedup = round(on["tokens_per_second"] / off["tokens_per_second"], 3) if on and off else None
    best = on or off or {"tokens_per_second": None, "acceptance": None}
    return {
        "tokens_per_second": best["tokens_per_second"],
        "acceptance": best["acceptance"],
        "mtp": {"on": on, "off": off, "speedup": speedup},
        "prompts": rows,
    }


def _line(row: Mapping[str, Any]) -> str:
    drafted = "" if row["acceptance"] is None else f", {row['acceptance']:.1%} of drafts accepted"
    at_once = "" if row["concurrency"] == 1 else f" x {row['concurrency']}"
    return f"{row['set']}/{row['name']}, {row['sampling']}{at_once}: {row['tokens_per_second']:.1f} tokens/s{drafted}"
