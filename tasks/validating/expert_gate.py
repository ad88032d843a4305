"""The gate of the experts that got no token of the calibration samples. Such an expert is rounded, and not tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from requant.tasks.recipe.recipe import Gates
from requant.tasks.validating.gates import Gate

EXPERT_GATE = "experts_without_tokens"
MAX_NAMED = 5


def judge_experts(tokens: Mapping[str, Sequence[int]], gates: Gates) -> list[Gate]:
    """Judge how many experts got no token: one gate, or none for a model without experts.

    `tokens` has the tokens of each expert by the name of the module that has the experts.
    """
    if not tokens:
        return []
    without = [f"{module}.{number}" for module, counts in tokens.items() for number, n in enumerate(counts) if not n]
    limit = gates.max_experts_without_tokens
    notes = ["no limit asked for"] if limit is None else []
    if without:
        more = f" and {len(without) - MAX_NAMED} more" if len(without) > MAX_NAMED else ""
        notes.append(f"{', '.join(without[:MAX_NAMED])}{more}; more samples, or calibration: self, reach more experts")
    passed = limit is None or len(without) <= limit
    return [Gate(EXPERT_GATE, float(len(without)), None if limit is None else float(limit), passed, "; ".join(notes))]
