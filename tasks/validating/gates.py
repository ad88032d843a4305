"""Gates: measured values against the recipe's limits. Pure functions: a changed limit measures nothing again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from requant.tasks.recipe.recipe import Gates

MAX_REPEATED_SHARE = 0.9  # share of one token in a greedy continuation from which on it is garbage
# Parts of a matrix that its rounding may lose: 0.28 at most in 2 bits and groups of 64, where nothing is clipped.
MAX_TUNABLE_ERROR = 0.3  # up to which more noise leaves more to tuning
LOST_MATRIX_ERROR = 0.5  # from which on the rounding says nothing of the matrix
# Gates whose limits no recipe sets.
FIXED = {"same_tokens", "most_repeated_token", "long_context", "vision_output", "speculative_decoding"}


# Gates that say how good the model is; the others ask whether it is whole.
QUALITY_GATES = {"perplexity_increase", "kl_divergence", "top1_agreement"}


@dataclass(frozen=True)
class Gate:
    """One comparison. `value` None: it could not be measured, and a limit that cannot be checked is not passed.
    `passed` None: it could not be measured, and no limit was asked for."""

    name: str
    value: float | None
    limit: float | None
    passed: bool | None
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.passed is False

    @property
    def result(self) -> str:
        """What came of it, in a word."""
        return {True: "passed", False: "failed", None: "not measured"}[self.passed]

    def to_json(self) -> dict[str, Any]:
        value = self.value if self.value is not None and math.isfinite(self.value) else None  # JSON has no NaN
        return {**asdict(self), "value": value}


def judge(measured: dict[str, Any], gates: Gates) -> list[Gate]:
    """All gates for the values that validate measured, as far as the model has what they ask for.

    Those without a limit are reported as passed if they were measured.
    """
    matrices, blocks = measured["matrices"] or [], measured["blocks"] or []
    why = measured.get("not_measured") or ""
    slope = _worst(matrices, slope_error, "name")
    offset = _worst(matrices, lambda matrix: abs(matrix["offset"]), "name")
    block = _worst(blocks, lambda block: float(block["error"]), "block")

    def at_most(name: str, value: float | None, limit: float | None, whose: str = "") -> Gate:
        return _gate(name, value, limit, value is not None and limit is not None and value <= limit, whose, not why)

    def at_least(name: str, value: float | None, limit: float | None, whose: str = "") -> Gate:
        return _gate(name, value, limit, value is not None and limit is not None and value >= limit, whose, not why)

    results = [
        _none("structure", measured["unaccounted"], measured.get("differences") or []),
        _none("lossless", measured["altered"]),
        _none("finite", measured["not_finite"]),
        _none("files", measured["files"]),
        _none("context", measured["context"]),
        at_most("weight_slope", slope[0], gates.max_weight_slope_error, slope[1]),
        at_most("weight_offset", offset[0], gates.max_weight_offset, offset[1]),
        at_least("same_tokens", measured["same_tokens"], 1.0),
        at_most("block_error", block[0], gates.max_block_error, block[1] and f"block {block[1]}"),
        at_most("perplexity_increase", measured["perplexity_increase"], gates.max_perplexity_increase),
        at_most("kl_divergence", measured["kl_divergence"], gates.max_kl_divergence),
        at_least("top1_agreement", measured["top1_agreement"], gates.min_top1_agreement),
        at_most("most_repeated_token", measured["most_repeated_token"], MAX_REPEATED_SHARE),
        at_least("long_context", measured["long_context"], 1.0),
    ]
    if measured["vision"]:
        results.append(at_most("vision_output", measured["vision_difference"], 0.0))
    if measured["head_kept"]:
        ratio = at_least("mtp_acceptance_ratio", measured["mtp_acceptance_ratio"], gates.min_mtp_acceptance_ratio)
        results.append(ratio)
    if measured["speculative_agreement"] is not None:  # decoded in float32, with a head
        results.append(at_least("speculative_decoding", measured["speculative_agreement"], 1.0))
    if "worst_task_recovery" in measured:  # tasks were asked for
        tasks, kept = measured["tasks"], measured["worst_task_recovery"]
        results.append(at_least("task_recovery", kept, gates.min_task_recovery, worst_task(tasks) if tasks else ""))
    unmeasured = [place for place, gate in enumerate(results) if gate.value is None]
    if why and unmeasured:  # told once: it is the same for all of them
        first = results[unmeasured[0]]
        results[unmeasured[0]] = replace(first, note=f"{first.note}: {why}")
    return results


def accepted(gates: Iterable[Gate]) -> bool:
    """Whether no gate failed, and something of the model's quality was measured at all."""
    gates = list(gates)
    return bool(measured_quality(gates)) and not any(gate.failed for gate in gates)


def measured_quality(gates: Iterable[Gate]) -> list[Gate]:
    """The gates that say how good the model is, as far as they were measured."""
    return [gate for gate in gates if gate.name in QUALITY_GATES and gate.value is not None]


def refusal(gates: Iterable[Gate]) -> str:
    """Why gates are not accepted, as a part of a sentence."""
    gates = list(gates)
    failed = [gate.name for gate in gates if gate.failed]
    if failed:
        return f"{', '.join(failed)} failed"
    return "nothing of its quality could be measured"


def summary(gates: Iterable[Gate]) -> str:
    """How many gates passed, failed and could not be measured."""
    gates = list(gates)
    failed = sum(gate.failed for gate in gates)
    unmeasured = sum(gate.passed is None for gate in gates)
    text = f"{failed} of {len(gates)} failed" if failed else f"{len(gates) - unmeasured} passed"
    return text + (f", {unmeasured} not measured" if unmeasured else "")


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
    scales, excess, left = _slope_parts(matrix)
    if math.isnan(scales) or math.isnan(excess) or math.isnan(float(matrix["slope"])):
        return math.nan
    return max(abs(scales), abs(excess) - left)


def slope_off(matrix: Mapping[str, Any]) -> float:
    """The same with its sign: above 0 where the matrix is too large."""
    scales, excess, left = _slope_parts(matrix)
    return scales if "scale_factor" in matrix and abs(scales) >= abs(excess) - left else excess


def _slope_parts(matrix: Mapping[str, Any]) -> tuple[float, float, float]:
    """By how much the scales of a matrix are off, by how much its slope is, and how much of the latter is left to
    tuning.

    A rounding with scales that are far too small clips nearly every weight, and tells nothing: the slope is then
    compared with that of the base itself. A record of a version that did not look at the rounding is compared with
    fine rounding, of which <Q, W> is <Q, Q> and so the slope 1 - error^2.
    """
    slope, noise = float(matrix["slope"]), _noise(matrix)
    scales = float(matrix.get("scale_factor", 1.0)) - 1
    if noise > LOST_MATRIX_ERROR:
        return scales, slope - 1, 0.0
    excess = float(matrix["slope_excess"]) if "scale_factor" in matrix else slope + noise - 1
    return scales, excess, min(noise, MAX_TUNABLE_ERROR) / 4


def _noise(matrix: Mapping[str, Any]) -> float:
    """|Q - W|^2 / |W|^2 of what rounding alone makes of the matrix, as far as it is known."""
    return float(matrix["rounding_noise"] if "rounding_noise" in matrix else matrix["error"] ** 2)


def most_repeated(tokens: list[int]) -> float:
    """The share of the most frequent token; 1.0 for one token repeated, and for nothing at all."""
    return Counter(tokens).most_common(1)[0][1] / len(tokens) if tokens else 1.0


def _none(name: str, sentences: Sequence[str], findings: Sequence[str] = ()) -> Gate:
    """A gate that no sentence may be said of; findings are told, and fail nothing."""
    told = [*sentences, *findings]
    more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    return Gate(name, float(len(sentences)), 0.0, not sentences, told[0] + more if told else "")


def _worst(
    rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float], name: str
) -> tuple[float | None, str]:
    """The largest value of some rows and whose it is; a value that is no number is larger than any."""
    found = [(value(row), str(row[name])) for row in rows]
    return max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0], default=(None, ""))


def _gate(name: str, value: float | None, limit: float | None, within: bool, whose: str, advise: bool) -> Gate:
    """advise: say how to go on without a value that could not be measured."""
    if limit is None and value is None:
        return Gate(name, None, None, None, "no limit asked for, and could not be measured")
    if limit is None:
        return Gate(name, value, None, True, "no limit asked for")
    note = "" if within else whose
    if value is None:
        note = "could not be measured"
        note += f": set gates for it to null to go on without {name}" if advise and name not in FIXED else ""
    return Gate(name, value, limit, within, note)
