"""Gates: measured values against the recipe's limits. Pure functions: a changed limit measures nothing again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tasks.recipe import Gates

MOST_REPEATED = 0.9  # share of one token in a greedy continuation from which on it is garbage
# Gates whose limits no recipe sets.
FIXED = {"same_tokens", "most_repeated_token", "long_context", "vision_output", "speculative_decoding"}


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
    matrices, blocks = measured["matrices"] or [], measured["blocks"] or []
    slope = _worst(matrices, slope_error, "name")
    offset = _worst(matrices, lambda matrix: abs(matrix["offset"]), "name")
    block = _worst(blocks, lambda block: float(block["error"]), "block")
    results = [
        _none("structure", measured["unaccounted"]),
        _none("lossless", measured["altered"]),
        _none("finite", measured["not_finite"]),
        _none("files", measured["files"]),
        _none("context", measured["context"]),
        _at_most("weight_slope", slope[0], gates.max_weight_slope_error, slope[1]),
        _at_most("weight_offset", offset[0], gates.max_weight_offset, offset[1]),
        _at_least("same_tokens", measured["same_tokens"], 1.0),
        _at_most("block_error", block[0], gates.max_block_error, block[1] and f"block {block[1]}"),
        _at_most("perplexity_increase", measured["perplexity_increase"], gates.max_perplexity_increase),
        _at_most("kl_divergence", measured["kl_divergence"], gates.max_kl_divergence),
        _at_least("top1_agreement", measured["top1_agreement"], gates.min_top1_agreement),
        _at_most("most_repeated_token", measured["most_repeated_token"], MOST_REPEATED),
        _at_least("long_context", measured["long_context"], 1.0),
    ]
    if measured["vision"]:
        results.append(_at_most("vision_output", measured["vision_difference"], 0.0))
    if measured["head_kept"]:
        ratio = _at_least("mtp_acceptance_ratio", measured["mtp_acceptance_ratio"], gates.min_mtp_acceptance_ratio)
        results.append(ratio)
    if measured["speculative_agreement"] is not None:  # decoded in float32, with a head
        results.append(_at_least("speculative_decoding", measured["speculative_agreement"], 1.0))
    if tasks := measured.get("tasks"):
        kept = measured["worst_task_recovery"]
        results.append(_at_least("task_recovery", kept, gates.min_task_recovery, worst_task(tasks)))
    return results


def worst_task(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The task that kept least of the base's score; one on which the base has none is worse than any."""
    return min(tasks, key=lambda name: -1.0 if tasks[name]["recovery"] is None else tasks[name]["recovery"])


def slope_error(matrix: Mapping[str, Any]) -> float:
    """How far a packed matrix is from a rounding of the base's with the scales and zero points that it states.

    The larger of two: by how much its scales are off, and how far its slope is from that of the rounding, less a
    quarter of the rounding's noise, which is left to tuning. What auto-round makes of a language model stays below
    0.027 in 2 bits and below 0.01 in 3, 4 and 8 bits, whatever the group. Scales that are 5 % off show as 0.04 or more
    (in 2 bits, where tuning may work against them, as 0.025 or more), another matrix as 0.4 or more.
    """
    slope, off, noise = float(matrix["slope"]), slope_off(matrix), _noise(matrix)
    if math.isnan(slope) or math.isnan(off):
        return math.nan
    if "scale_factor" not in matrix:
        return max(0.0, abs(off) - noise / 4)
    return max(abs(float(matrix["scale_factor"]) - 1), abs(float(matrix["slope_excess"])) - noise / 4)


def slope_off(matrix: Mapping[str, Any]) -> float:
    """The same with its sign: above 0 where the matrix is too large.

    A record of a version that did not look at the rounding is compared with fine rounding, of which <Q, W> is <Q, Q>
    and so the slope 1 - error^2.
    """
    noise = _noise(matrix)
    if "scale_factor" not in matrix:
        return float(matrix["slope"]) + noise - 1
    scales, excess = float(matrix["scale_factor"]) - 1, float(matrix["slope_excess"])
    return scales if abs(scales) >= abs(excess) - noise / 4 else excess


def _noise(matrix: Mapping[str, Any]) -> float:
    """|Q - W|^2 / |W|^2 of what rounding alone makes of the matrix, as far as it is known."""
    return float(matrix["rounding_noise"] if "rounding_noise" in matrix else matrix["error"] ** 2)


def most_repeated(tokens: list[int]) -> float:
    """The share of the most frequent token; 1.0 for one token repeated, and for nothing at all."""
    return Counter(tokens).most_common(1)[0][1] / len(tokens) if tokens else 1.0


def _none(name: str, sentences: list[str]) -> Gate:
    note = sentences[0] if sentences else ""
    more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
    return Gate(name, float(len(sentences)), 0.0, not sentences, note + more)


def _worst(
    rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float], name: str
) -> tuple[float | None, str]:
    """The largest value of some rows and whose it is; a value that is no number is larger than any."""
    found = [(value(row), str(row[name])) for row in rows]
    return max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0], default=(None, ""))


def _at_most(name: str, value: float | None, limit: float | None, whose: str = "") -> Gate:
    return _gate(name, value, limit, value is not None and limit is not None and value <= limit, whose)


def _at_least(name: str, value: float | None, limit: float | None, whose: str = "") -> Gate:
    return _gate(name, value, limit, value is not None and limit is not None and value >= limit, whose)


def _gate(name: str, value: float | None, limit: float | None, within: bool, whose: str = "") -> Gate:
    if limit is None:
        return Gate(name, value, None, True, "no limit asked for")
    note = "" if within else whose
    if value is None:
        note = "could not be measured"
        note += "" if name in FIXED else f": set gates for it to null to go on without {name}"
    return Gate(name, value, limit, within, note)
