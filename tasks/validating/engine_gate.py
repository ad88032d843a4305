"""The gate of the draft acceptance rate in an engine. It is judged after the benchmark; the others before."""

from __future__ import annotations

from dataclasses import dataclass

from requant.tasks.recipe.recipe import Gates
from requant.tasks.validating.drafts import MAX_DRAFTED_TOKENS, DraftComparison
from requant.tasks.validating.gates import NO_BASE_ACCEPTANCE, Gate
from requant.tasks.validating.measured import Measured
from requant.tasks.validating.ratio import Ratio

ENGINE_GATE = "engine_acceptance_ratio"


@dataclass(frozen=True)
class EngineDrafts:
    """What is known of the drafts in an engine: the comparison with the base's, or why there is none."""

    comparison: DraftComparison | None = None
    why_not: str = ""


def judge_engine(measured: Measured, gates: Gates, drafts: EngineDrafts | None) -> list[Gate]:
    """Judge the drafts in an engine: one gate, or none where no engine ran (`drafts` None) and none had to.

    The gate passes if the whole interval of the ratio is at the limit or above, and fails if it is below. In between,
    and without a ratio, it is not judged. That fails only if the recipe requires the acceptance, and it was not
    measured in torch either.
    """
    required = gates.mtp_acceptance == "required" and measured.head_kept
    required = required and measured.behaviour.mtp_acceptance_ratio is None
    limit = gates.min_mtp_acceptance_ratio
    if drafts is None:
        note = "no engine compared drafts: set benchmark.engine to vllm, or gates.mtp_acceptance to null"
        return [Gate(ENGINE_GATE, None, limit, False, note)] if required else []
    comparison = drafts.comparison
    ratio = comparison.ratio if comparison else None
    if comparison is None or ratio is None:
        why = _why_undefined(comparison) if comparison else drafts.why_not
        return [Gate(ENGINE_GATE, None, limit, False if required else None, why)]
    interval = (ratio.low, ratio.high)
    note = f"between {ratio.low:.3f} and {ratio.high:.3f}: {_counts(comparison)}"
    if limit is None:
        return [Gate(ENGINE_GATE, ratio.value, None, True, f"no limit asked for; {note}", interval)]
    if ratio.low < limit <= ratio.high:
        note = f"{note}; {_remedy(ratio, limit, comparison)}"
        return [Gate(ENGINE_GATE, ratio.value, limit, False if required else None, note, interval)]
    return [Gate(ENGINE_GATE, ratio.value, limit, ratio.low >= limit, note, interval)]


def _counts(comparison: DraftComparison) -> str:
    """Say what the rates are, and of how many drafted tokens."""
    ours, base = comparison.quantized, comparison.base
    if not ours.tokens:
        return f"it drafted nothing, the base {base.tokens:,} tokens"
    return f"{ours.rate or 0:.1%} of {ours.tokens:,} drafted tokens, the base's {base.rate or 0:.1%} of {base.tokens:,}"


def _why_undefined(comparison: DraftComparison) -> str:
    return NO_BASE_ACCEPTANCE if comparison.base.tokens else "the engine counted no drafts of the base"


def _remedy(ratio: Ratio, limit: float, comparison: DraftComparison) -> str:
    """Say how many more drafted tokens would tell, and with which precision they are counted."""
    more = ratio.further_tokens(limit, comparison.quantized.tokens)
    if more is None:
        return "the ratio is the limit" if ratio.value == limit else "too few drafts were made or accepted to tell"
    further = f"about {_round_up(more):,} more drafted tokens would tell"
    if comparison.quantized.tokens + more > MAX_DRAFTED_TOKENS:
        return f"{further}, and at most {MAX_DRAFTED_TOKENS:,} are counted"
    return f"{further}: lower benchmark.acceptance_precision"


def _round_up(count: int) -> int:
    """Round a number up to two digits."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit
