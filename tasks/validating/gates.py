"""Gates: comparison of measured values with the recipe's limits.

All functions are pure, so that a changed limit measures nothing again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, TypeVar

from pydantic import Field

from requant.tasks.documents import Value, finite_or_none, is_none
from requant.tasks.recipe.recipe import Gates
from requant.tasks.validating.domain_gates import WorstDomain, worst_domain
from requant.tasks.validating.measured import Behaviour, MatrixError, Measured, TaskScore
from requant.tasks.validating.paired import Comparison

MAX_REPEATED_SHARE = 0.9  # share of one token in a greedy continuation above which the text is garbage
REPEATED_SHARE_MARGIN = 0.1  # by which a result may repeat one token more than its base, whatever the share
# Shares of |W|^2 that rounding alone may lose: 0.28 at most in 2 bits and groups of 64, where nothing is clipped.
MAX_TUNABLE_NOISE = 0.3  # above this, more noise gives tuning no more freedom
LOST_MATRIX_NOISE = 0.5  # above this, the rounding says nothing about the matrix
NO_BASE_ACCEPTANCE = "is undefined, since none of the base's drafts is accepted"  # The ratio to 0 does not exist.
NOT_IN_TORCH = "Requant cannot run an MTP head of this layout in torch: with benchmark.engine vllm, the engine is asked"
# Gates whose limits no recipe can set.
FIXED = {"same_tokens", "most_repeated_token", "long_context", "vision_output", "speculative_decoding"}
# Gates that say how good the model is. The others ask whether it is complete and undamaged.
QUALITY_GATES = {"perplexity_increase", "kl_divergence", "top1_agreement"}

Row = TypeVar("Row")


@dataclass(frozen=True)
class Gate:
    """One comparison of a measured value with its limit.

    `value` None: it could not be measured. It then does not pass a limit. `passed` None: the gate was not judged, since
    no limit was asked for, or nothing here can measure the value, or the value's interval holds the limit.
    """

    name: Annotated[str, Field(description="The gate")]
    value: Annotated[
        Value | None,
        Field(description="The measured value, in the unit of its limit; null if not measured, or if not finite"),
    ]
    limit: Annotated[float | None, Field(description="What the value is compared with; null without a limit")]
    passed: Annotated[
        bool | None,
        Field(description="null: not judged, because the value was not measured or its interval is too wide"),
    ]
    note: Annotated[str, Field(description="The reason, or the tensor, block or task with the worst value")] = ""
    interval: Annotated[
        tuple[float, float] | None,
        Field(description="The value's 95 % interval, where that is judged; otherwise absent", exclude_if=is_none),
    ] = None

    @property
    def failed(self) -> bool:
        return self.passed is False

    @property
    def result(self) -> str:
        """The outcome in a word or two."""
        if self.passed is None:
            return "not measured" if self.value is None else "cannot tell"
        if self.passed and self.limit is None:
            return "measured"
        return "passed" if self.passed else "failed"

    def to_json(self) -> dict[str, Any]:
        document = {**asdict(self), "value": finite_or_none(self.value)}
        return {key: value for key, value in document.items() if key != "interval" or value is not None}


def judge(measured: Measured, gates: Gates) -> list[Gate]:
    """Compare measured values with their limits, for all gates that apply to the model.

    A gate without a limit passes if its value was measured.
    """
    audit, behaviour, divergence = measured.audit, measured.behaviour, measured.divergence
    why = measured.not_measured or ""
    slope = _worst(measured.matrices, slope_error, lambda matrix: matrix.name)
    offset = _worst(measured.matrices, lambda matrix: abs(matrix.offset), lambda matrix: matrix.name)
    block = _worst(divergence.blocks, lambda block: block.error, lambda block: f"block {block.block}")

    def at_most(name: str, value: float | None, limit: float | None, worst: str = "") -> Gate:
        return _gate(name, value, limit, value is not None and limit is not None and value <= limit, worst, not why)

    def at_least(name: str, value: float | None, limit: float | None, worst: str = "") -> Gate:
        return _gate(name, value, limit, value is not None and limit is not None and value >= limit, worst, not why)

    domains = divergence.domains or {}
    noise = divergence.kl_noise_floor or 0.0

    def on_worst(
        compare: Callable[..., Gate], name: str, value: float | None, limit: float | None, floor: float = 0.0
    ) -> Gate:
        whole = compare(name, value, None if limit is None else limit + floor)
        return _on_worst_domain(whole, worst_domain(name, domains, limit, is_most=compare is at_most))

    results = [
        _no_problem("structure", audit.unaccounted, audit.differences),
        _no_problem("lossless", audit.altered),
        _no_problem("finite", audit.not_finite, audit.not_finite_in_base),
        _no_problem("files", audit.files),
        _no_problem("context", audit.context),
        at_most("weight_slope", slope[0], gates.max_weight_slope_error, slope[1]),
        at_most("weight_offset", offset[0], gates.max_weight_offset, offset[1]),
        at_least("same_tokens", behaviour.same_tokens, 1.0),
        at_most("block_error", block[0], gates.max_block_error, block[1]),
        on_worst(at_most, "perplexity_increase", behaviour.perplexity_increase, gates.max_perplexity_increase),
        _above_floor(
            on_worst(at_most, "kl_divergence", divergence.kl_divergence, gates.max_kl_divergence, noise),
            gates.max_kl_divergence,
        ),
        on_worst(at_least, "top1_agreement", behaviour.top1_agreement, gates.min_top1_agreement),
        _repetition(at_most, behaviour),
        _no_worse(at_least, "long_context", behaviour.long_context, behaviour.base_long_context),
    ]
    if measured.vision:
        results.append(at_most("vision_output", divergence.vision_difference, 0.0))
    if measured.head_kept:
        limit = gates.min_mtp_acceptance_ratio
        ratio = on_worst(at_least, "mtp_acceptance_ratio", behaviour.mtp_acceptance_ratio, limit)
        if ratio.value is None and behaviour.base.mtp_acceptance == 0:
            ratio = replace(ratio, note=ratio.note.replace("could not be measured", NO_BASE_ACCEPTANCE))
        elif behaviour.was_run and behaviour.base.has_unknown_acceptance:
            ratio = replace(ratio, passed=None, note=NOT_IN_TORCH)
        results.append(ratio)
    if behaviour.speculative_agreement is not None:  # it is measured in float32 and with a head only
        of_base = behaviour.base_speculative_agreement
        results.append(_no_worse(at_least, "speculative_decoding", behaviour.speculative_agreement, of_base))
    if measured.evaluation is not None:
        tasks, worst_recovery = measured.evaluation.tasks or {}, measured.evaluation.worst_task_recovery
        worst = worst_task(tasks) if tasks else ""
        recovery = at_least("task_recovery", worst_recovery, gates.min_task_recovery, worst)
        results.append(_beyond_noise(recovery, tasks))
    unmeasured = [index for index, gate in enumerate(results) if gate.value is None and gate.note != NOT_IN_TORCH]
    if why and unmeasured:  # the reason is the same for all of them, so the first one is enough
        first = results[unmeasured[0]]
        results[unmeasured[0]] = replace(first, note=f"{first.note}: {why}")
    return [_same_tokens(gate, measured) if gate.name == "same_tokens" else gate for gate in results]


def accepted(gates: Iterable[Gate]) -> bool:
    """Check whether no gate failed and at least one value of the model's quality was measured."""
    gates = list(gates)
    return bool(measured_quality(gates)) and not any(gate.failed for gate in gates)


def measured_quality(gates: Iterable[Gate]) -> list[Gate]:
    """Return the gates of the model's quality whose values were measured."""
    return [gate for gate in gates if gate.name in QUALITY_GATES and gate.value is not None]


def refusal(gates: Iterable[Gate]) -> str:
    """Say why gates are not accepted, as a part of a sentence."""
    failed = [gate.name for gate in gates if gate.failed]
    if failed:
        return f"{', '.join(failed)} failed"
    return "nothing of its quality could be measured"


def summary(gates: Iterable[Gate]) -> str:
    """Count the gates that passed, failed and were not judged."""
    gates = list(gates)
    results = Counter(gate.result for gate in gates)
    text = f"{results['failed']} of {len(gates)} failed" if results["failed"] else f"{results['passed']} passed"
    words = {"measured": "measured without a limit", "not measured": "not measured", "cannot tell": "cannot tell"}
    return text + "".join(f", {results[word]} {shown}" for word, shown in words.items() if results[word])


def _same_tokens(gate: Gate, measured: Measured) -> Gate:
    """Say of which tokens everything else was measured if the checkpoint's tokenizer makes other ones."""
    if not gate.failed or measured.divergence.kl_divergence is None:
        return gate
    note = "everything else is measured on the base's tokens"
    return replace(gate, note=f"{gate.note}; {note}" if gate.note else note)


def _repetition(at_most: Callable[..., Gate], behaviour: Behaviour) -> Gate:
    """Compare the most repeated token with MAX_REPEATED_SHARE, or with the base's own share where that is as large.

    Models without instruction tuning, and small ones, loop in greedy text by themselves.
    """
    of_base, limit = behaviour.base_most_repeated_token, MAX_REPEATED_SHARE
    if of_base is not None:
        limit = max(limit, min(1.0, of_base + REPEATED_SHARE_MARGIN))
    gate = at_most("most_repeated_token", behaviour.most_repeated_token, limit)
    return replace(gate, note=f"the base's own is {of_base:.4g}") if limit > MAX_REPEATED_SHARE else gate


def _no_worse(at_least: Callable[..., Gate], name: str, value: float | None, of_base: float | None) -> Gate:
    """Compare a share that should be 1 with the base's own where the base falls short of that."""
    if of_base is None or not of_base < 1.0:
        return at_least(name, value, 1.0)
    gate = at_least(name, value, of_base)
    return replace(gate, note="; ".join(filter(None, [gate.note, f"the base's own is {of_base:.4g}"])))


def worst_task(tasks: Mapping[str, TaskScore]) -> str:
    """Name the task with the smallest recovery. A task in which the base scores 0 is worse than any other."""

    def share(name: str) -> float:
        recovery = tasks[name].recovery
        return -1.0 if recovery is None else recovery

    return min(tasks, key=share)


def _beyond_noise(gate: Gate, tasks: Mapping[str, TaskScore]) -> Gate:
    """Let the gate on recovery fail only for tasks whose loss is more than noise.

    That is a task without pairs, one whose interval of the difference lies below zero, or one whose interval of the
    recovery lies below the limit. If there is none, the gate passes if all tasks below the limit are equivalent to the
    base at their margin, and otherwise cannot tell.
    """
    limit = gate.limit or 0.0
    below = {name: task for name, task in tasks.items() if (task.recovery or 0.0) < limit}
    if not gate.failed or gate.value is None or not below:
        return gate
    real = {name: task for name, task in below.items() if task.paired is None or _is_loss(task.paired, limit)}
    unclear = {name: task for name, task in below.items() if task.paired and task.paired.more_items}
    name = worst_task(real or unclear or below)
    task = (real or unclear or below)[name]
    gate = replace(gate, value=task.recovery, note=name)
    if task.paired is None:
        return gate
    gate = replace(gate, interval=task.paired.recovery_interval)
    flips = f"{name}: {task.paired.lost} lost and {task.paired.gained} gained of {task.paired.items} items"
    if real:
        return replace(gate, note=flips)
    if unclear:
        return replace(gate, passed=None, note=f"{flips}, which may be noise: {task.paired.more_items} more would tell")
    return replace(gate, passed=True, note=f"{flips}, which is noise, and equivalent at the margin")


def _is_loss(paired: Comparison, limit: float) -> bool:
    """Check whether a loss, or a recovery below the limit, is more than noise."""
    return paired.interval[1] < 0 or (paired.recovery_interval is not None and paired.recovery_interval[1] < limit)


def slope_error(matrix: MatrixError) -> float:
    """Return how far a quantized matrix is from a rounding of the base's with its own scales and zero points.

    This is the larger of two values: by how much its scales are off, and how far its slope is from that of the
    rounding, less a quarter of the rounding's noise, which is left to tuning. NaN if one of them is NaN.

    Results of auto-round on language models stay below 0.027 in 2 bits and below 0.01 in 3, 4 and 8 bits, for every
    group size. Scales that are 5 % off show as 0.04 or more (in 2 bits, where tuning may work against them, as 0.025 or
    more), another matrix as 0.4 or more.
    """
    scales, excess, tunable = _slope_parts(matrix)
    if math.isnan(scales) or math.isnan(excess) or math.isnan(matrix.slope):
        return math.nan
    return max(abs(scales), abs(excess) - tunable)


def slope_off(matrix: MatrixError) -> float:
    """Return the same deviation with its sign: above 0 if the matrix is too large."""
    scales, excess, tunable = _slope_parts(matrix)
    return scales if matrix.scale_factor is not None and abs(scales) >= abs(excess) - tunable else excess


def _slope_parts(matrix: MatrixError) -> tuple[float, float, float]:
    """Return by how much the scales and the slope are off, and how much of the latter is left to tuning.

    A rounding with scales that are far too small clips nearly every weight and says nothing: the slope is then compared
    with that of the base itself. The record of a version that did not compare with the rounding is compared with fine
    rounding, of which <Q, W> is <Q, Q> and so the slope 1 - error^2.
    """
    scales = 0.0 if matrix.scale_factor is None else matrix.scale_factor - 1
    noise = matrix.error**2 if matrix.rounding_noise is None else matrix.rounding_noise
    if noise > LOST_MATRIX_NOISE:
        return scales, matrix.slope - 1, 0.0
    excess = matrix.slope + noise - 1 if matrix.slope_excess is None else matrix.slope_excess
    return scales, excess, min(noise, MAX_TUNABLE_NOISE) / 4


def most_repeated(tokens: Sequence[int]) -> float:
    """Return the share of the most frequent token: 1.0 for one token repeated, and for no tokens."""
    return Counter(tokens).most_common(1)[0][1] / len(tokens) if tokens else 1.0


def _no_problem(name: str, problems: Sequence[str], findings: Sequence[str] = ()) -> Gate:
    """Make a gate that any problem fails. Findings are shown in the note and fail nothing."""
    sentences = [*problems, *findings]
    more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
    return Gate(name, float(len(problems)), 0.0, not problems, sentences[0] + more if sentences else "")


def _worst(
    rows: Sequence[Row] | None, value: Callable[[Row], float], name: Callable[[Row], str]
) -> tuple[float | None, str]:
    """Return the largest value of some rows and the name of its row. NaN counts as larger than any number."""
    values = [(value(row), name(row)) for row in rows or ()]
    return max(values, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0], default=(None, ""))


def _on_worst_domain(whole: Gate, worst: WorstDomain | None) -> Gate:
    """Return the gate for all domains together with the value of the worst domain, which may fail it, too."""
    if whole.value is None or worst is None:
        return whole
    note = f"{whole.note}; {worst.note}" if whole.limit is None else worst.note
    if whole.failed:
        note = f"all domains together: {whole.value:.4g}; {note}"
    passed = whole.passed and not worst.fails
    return replace(whole, value=worst.value, limit=worst.limit, passed=passed, note=note)


def _above_floor(gate: Gate, asked: float | None) -> Gate:
    """Say where the limit of a gate is higher than the recipe's, since the base's noise floor is added to it."""
    if gate.limit is None or asked is None or gate.value is None or gate.limit == asked:
        return gate
    why = f"the limit is {asked:g} and the base's noise floor of {gate.limit - asked:.2g}"
    return replace(gate, note="; ".join(filter(None, [gate.note, why])))


def _gate(name: str, value: float | None, limit: float | None, within: bool, worst: str, advise: bool) -> Gate:
    """Make a gate for a value that is `within` its limit or not.

    `worst`: the row that the value is of. `advise`: say how to go on without a value that could not be measured.
    """
    if limit is None and value is None:
        return Gate(name, None, None, None, "no limit asked for, and could not be measured")
    if limit is None:
        return Gate(name, value, None, True, "no limit asked for")
    note = "" if within else worst
    if value is None:
        note = "could not be measured"
        note += f": set gates for it to null to go on without {name}" if advise and name not in FIXED else ""
    return Gate(name, value, limit, within, note)
