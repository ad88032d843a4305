"""Gates: measured values against the recipe's limits. Pure functions: a changed limit measures nothing again."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from tasks.recipe import Gates

MOST_REPEATED = 0.9  # share of one token in a greedy continuation from which on it is garbage


@dataclass(frozen=True)
class Gate:
    """One comparison. `value` None: it could not be measured, and a limit that cannot be checked is not passed."""

    name: str
    value: float | None
    limit: float | None
    passed: bool
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        value = self.value if self.value is not None and math.isfinite(self.value) else None  # JSON has no NaN
        return {**asdict(self), "value": value}


def compare(measured: dict[str, Any], gates: Gates) -> list[Gate]:
    """All gates for the values that validate measured. Those without a limit are reported as passed."""
    head = measured["head_kept"]
    results = [
        _none("structure", measured["unaccounted"]),
        _none("lossless", measured["altered"]),
        _none("finite", measured["not_finite"]),
        _none("files", measured["files"]),
        _at_least("same_tokens", measured["same_tokens"], 1.0),
        _at_most("perplexity_increase", measured["perplexity_increase"], gates.max_perplexity_increase),
        _at_least("top1_agreement", measured["top1_agreement"], gates.min_top1_agreement),
        _at_most("most_repeated_token", measured["most_repeated_token"], MOST_REPEATED),
    ]
    if head:
        ratio = _at_least("mtp_acceptance_ratio", measured["mtp_acceptance_ratio"], gates.min_mtp_acceptance_ratio)
        results.append(ratio)
    return results


def most_repeated(tokens: list[int]) -> float:
    """The share of the most frequent token; 1.0 for one token repeated, and for nothing at all."""
    return Counter(tokens).most_common(1)[0][1] / len(tokens) if tokens else 1.0


def _none(name: str, sentences: list[str]) -> Gate:
    note = sentences[0] if sentences else ""
    more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
    return Gate(name, float(len(sentences)), 0.0, not sentences, note + more)


def _at_most(name: str, value: float | None, limit: float | None) -> Gate:
    return _gate(name, value, limit, value is not None and limit is not None and value <= limit)


def _at_least(name: str, value: float | None, limit: float | None) -> Gate:
    return _gate(name, value, limit, value is not None and limit is not None and value >= limit)


def _gate(name: str, value: float | None, limit: float | None, within: bool) -> Gate:
    if limit is None:
        return Gate(name, value, None, True, "no limit asked for")
    note = "" if value is not None else f"could not be measured: set gates for it to null to go on without {name}"
    return Gate(name, value, limit, within, note)
