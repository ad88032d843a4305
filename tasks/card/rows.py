"""Rows of the card's tables, and their columns. A run's report has the tables of quality, drafts and tasks, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from requant.tasks.card.facts import CardFacts
from requant.tasks.card.filters import escape, name_characters, named, number
from requant.tasks.formatting import gigabytes
from requant.tasks.recipe.quantize_section import SELF
from requant.tasks.record import RecordedSource, StageRecord
from requant.tasks.redaction import public
from requant.tasks.serving.result import BenchmarkResult, PromptResult, SpeedSummary
from requant.tasks.validating.measured import DomainValues, Interval, Measured, TaskScore
from requant.tasks.validating.paired import Comparison

SUMMARY_COLUMNS = ("", "base", "this model")
QUALITY_COLUMNS = ("", "base", "quantized", "95 % interval")
DOMAIN_COLUMNS = (
    "domain", "tokens", "perplexity, base", "over the base's", "KL divergence, nats", "99 % of tokens below",
    "noise floor", "same next token", "first draft accepted, base", "ratio to the base's",
)  # fmt: skip
DRAFT_COLUMNS = ("draft", "base", "quantized", "base, on its own text", "quantized, on its own text")
TASK_COLUMNS = ("task", "metric", "base", "quantized", "recovery", "samples", "lost, gained", "verdict")
SPEED_COLUMNS = ("requests", "without MTP", "with MTP", "speedup", "draft acceptance rate")
PROMPT_COLUMNS = ("prompt, greedy, alone", "tokens", "without MTP", "with MTP", "draft acceptance rate")
HEADLESS = {"without MTP": "tokens per second", "with MTP": None, "speedup": None, "draft acceptance rate": None}
SOURCE_COLUMNS = ("calibration text", "samples", "rows read", "tokens read", "chats", "license")
EXPERT_COLUMNS = ("experts", "number", "tokens each, mean", "least", "most", "without a token")
Row = tuple[str, ...]


def summary_rows(facts: CardFacts) -> list[Row]:
    """Compare sizes, quality and speed at a glance. What was not measured has no row."""
    files, behaviour = facts.files, facts.measured.behaviour
    base, ours = behaviour.base, behaviour.quantized
    rows: list[Row] = [("weights", gigabytes(files.base_weights_bytes), gigabytes(files.weights_bytes))]
    for tokens, size in files.cache_bytes.items():
        both = (gigabytes(weights + size) for weights in (files.base_weights_bytes, files.weights_bytes))
        rows.append((f"weights and the cache of {tokens:,} tokens", *both))
    for name, task in (facts.measured.evaluation.tasks or {} if facts.measured.evaluation else {}).items():
        rows.append((name_characters(f"{name}, {task.metric}"), number(task.base, ".4g"), number(task.ours, ".4g")))
    increase = number(behaviour.perplexity_increase, "+.1%")
    perplexity = f"{number(ours.perplexity, '.4f')} ({increase})" if increase else number(ours.perplexity, ".4f")
    rows.append(("perplexity", number(base.perplexity, ".4f"), perplexity))
    rows.append(("KL divergence, nats", "", number(facts.measured.divergence.kl_divergence, ".4f")))
    rows.append(("same next token as the base", "", number(behaviour.top1_agreement, ".1%")))
    rows.append(("first draft accepted", number(base.mtp_acceptance, ".1%"), number(ours.mtp_acceptance, ".1%")))
    in_engine = facts.benchmark.engine != "torch"
    for mtp, words in ((False, "output tokens per second"), (True, "output tokens per second, with MTP")):
        speed = facts.benchmark.summary(mtp=mtp, sampling="greedy", concurrency=1)
        rows.append((words, "", number(speed.tokens_per_second, ".1f") if speed and in_engine else ""))
    return [row for row in rows if row[2]]


def quality_rows(measured: Measured) -> list[Row]:
    """Compare the measured quality of both models, with the 95 % interval of the quantized one where it has one."""
    behaviour, divergence = measured.behaviour, measured.divergence
    base, quantized = behaviour.base, behaviour.quantized
    increase, increase_interval = behaviour.perplexity_increase, behaviour.perplexity_increase_interval
    rows: list[tuple[str, float | None, float | None, Interval | None, str]] = [
        ("perplexity", base.perplexity, quantized.perplexity, quantized.perplexity_interval, ".4f"),
        ("perplexity against the base's", None, increase, increase_interval, "+.2%"),
        ("KL divergence, nats", None, divergence.kl_divergence, None, ".4f"),
        ("KL divergence, 99 % of tokens below", None, divergence.kl_divergence_p99, None, ".4f"),
        ("same next token", None, behaviour.top1_agreement, None, ".2%"),
        ("draft acceptance rate, first draft", base.mtp_acceptance, quantized.mtp_acceptance, None, ".1%"),
    ]
    return [
        (name, number(of_base, form), number(value, form), " to ".join(number(end, form) for end in interval or ()))
        for name, of_base, value, interval, form in rows
        if value is not None
    ]


def domain_rows(domains: Mapping[str, DomainValues] | None) -> list[Row]:
    """Compare both models by domain of the text, with 95 % intervals in parentheses."""
    return [
        (
            domain,
            number(values.tokens, ","),
            number(values.base_perplexity, ".2f"),
            _with_interval(values.perplexity_increase, values.perplexity_increase_interval, "+.1f", percent=True),
            _with_interval(values.kl_divergence, values.kl_divergence_interval, ".3g"),
            _with_interval(values.kl_divergence_p99, values.kl_divergence_p99_interval, ".2g"),
            number(values.kl_noise_floor, ".1g"),
            _with_interval(values.top1_agreement, values.top1_agreement_interval, ".1f", percent=True),
            number(values.base_mtp_acceptance, ".1%"),
            _with_interval(values.mtp_acceptance_ratio, values.mtp_acceptance_ratio_interval, ".3f"),
        )
        for domain, values in (domains or {}).items()
    ]


def _with_interval(value: float | None, interval: Interval | None, form: str, *, percent: bool = False) -> str:
    """Format a value and its interval; with `percent`, as shares of 1 in percent."""
    scale = 100 if percent else 1
    text = number(None if value is None else scale * value, form) + ("%" if percent and value is not None else "")
    if interval is None or value is None:
        return text
    return f"{text} ({' to '.join(number(scale * end, form) for end in interval)})"


def head_rows(measured: Measured) -> list[Row]:
    """Compare the shares of steps that accept each draft and all before it, on the pinned text and on greedy text."""
    base, quantized = measured.behaviour.base, measured.behaviour.quantized
    columns = [
        base.mtp_acceptance_by_position or (),
        quantized.mtp_acceptance_by_position or (),
        base.greedy_acceptance_by_position or (),
        quantized.greedy_acceptance_by_position or (),
    ]
    return [
        (str(position + 1), *(number(rates[position] if position < len(rates) else None, ".1%") for rates in columns))
        for position in range(max(map(len, columns)))
    ]


def task_rows(measured: Measured) -> list[Row]:
    """Compare the scores of both models in lm-eval tasks, on the samples that both did."""
    tasks = measured.evaluation.tasks if measured.evaluation else None
    return [
        (
            named(name),
            escape(task.metric),
            number(task.base, ".4g"),
            number(task.ours, ".4g"),
            _recovery(task),
            number(task.samples, ",") or "-",
            f"{task.paired.lost}, {task.paired.gained}" if task.paired else "-",
            _verdict(task.paired) if task.paired else "-",
        )
        for name, task in (tasks or {}).items()
    ]


def _recovery(task: TaskScore) -> str:
    """Format the recovery, with its interval where there is one."""
    ends = task.paired.recovery_interval if task.paired else None
    interval = f" ({number(ends[0], '.1%')} to {number(ends[1], '.1%')})" if ends else ""
    return f"{number(task.recovery, '.1%')}{interval}" if task.recovery is not None else "none"


def _verdict(found: Comparison) -> str:
    """Format what the comparison says, and what is missing if that is nothing."""
    return f"{found.verdict}: {found.more_items:,} more samples" if found.more_items else found.verdict.value


def speed_rows(benchmark: BenchmarkResult) -> list[Row]:
    """Compare output tokens per second without and with MTP, for each sampling and number of requests at once."""
    rows: list[Row] = []
    for sampling in benchmark.sampling or ():
        for at_once in sorted({row.concurrency for row in benchmark.prompts}):
            off, on = (benchmark.summary(mtp=mtp, sampling=sampling, concurrency=at_once) for mtp in (False, True))
            speedup = on.tokens_per_second / off.tokens_per_second if on and off else None
            words = f"{sampling}, {'one at a time' if at_once == 1 else f'{at_once} at once'}"
            rows.append((words, _speed(off), _speed(on), number(speedup, ".2f") or "-", _acceptance(on)))
    return rows


def prompt_rows(benchmark: BenchmarkResult) -> list[Row]:
    """Compare output tokens per second for each prompt, decoded greedily, one request at a time."""
    prompts: dict[tuple[str, str], dict[bool, PromptResult]] = {}
    for row in benchmark.prompts:
        if row.sampling == "greedy" and row.concurrency == 1:
            prompts.setdefault((row.set, row.name), {})[row.mtp] = row
    return [
        (
            f"{name[0]}: {name[1]}",
            str(next(iter(modes.values())).tokens),
            _speed(modes.get(False)),
            _speed(modes.get(True)),
            _acceptance(modes.get(True)),
        )
        for name, modes in prompts.items()
    ]


def without_drafts(columns: Row, rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """Leave out the columns about drafts, for a model without an MTP head."""
    kept = [number for number, column in enumerate(columns) if HEADLESS.get(column, column) is not None]
    return tuple(HEADLESS.get(columns[n]) or columns[n] for n in kept), [tuple(row[n] for n in kept) for row in rows]


def source_rows(sources: Sequence[RecordedSource]) -> list[Row]:
    """List what was taken from each calibration text: samples by domain, of the rows and tokens that were read."""
    rows: list[Row] = []
    for source in sources:
        domains = [f"{count} {escape(domain)}" for domain, count in source.samples.items() if domain and count]
        total = sum(source.samples.values())
        samples = f"{total} ({', '.join(domains)})" if domains else str(total)
        chats = f"{source.templated} through the template" if source.templated else ""
        plain = f"{source.plain} as plain text ({escape(source.reason or '')})" if source.plain else ""
        own = "written by the base" if source.name == SELF else ""
        words = ", ".join(filter(None, [own, chats, plain]))
        name = named(public(source.name))
        rows.append((name, samples, f"{source.rows:,}", f"{source.tokens:,}", words, escape(source.license or "")))
    return rows


def expert_rows(experts: Mapping[str, Sequence[int]]) -> list[Row]:
    """List how many tokens of the calibration the experts got, by the module that has them."""
    return [
        (
            named(name),
            str(len(tokens)),
            f"{sum(tokens) / len(tokens):,.0f}",
            f"{min(tokens):,}",
            f"{max(tokens):,}",
            ", ".join(str(number) for number, count in enumerate(tokens) if not count) or "none",
        )
        for name, tokens in experts.items()
        if tokens
    ]


def stage_rows(provenance: Mapping[str, StageRecord]) -> list[Row]:
    """List the seconds, hardware and tools of each stage."""
    return [
        (
            name,
            number(record.seconds or 0, ".1f"),
            escape(_hardware(record)),
            escape(", ".join(f"{tool} {version}" for tool, version in record.tools.items())),
        )
        for name, record in provenance.items()
    ]


def _speed(row: PromptResult | SpeedSummary | None) -> str:
    return number(row.tokens_per_second, ".1f") if row else "-"


def _acceptance(row: PromptResult | SpeedSummary | None) -> str:
    return number(row.acceptance, ".1%") or "-" if row else "-"


def _hardware(record: StageRecord) -> str:
    """Name the device that the stage used, where it says so, and the machine around it."""
    machine = record.machine
    device = record.device or record.benchmark_hardware
    words = [device] if device and not device.lower().startswith("cpu") else []
    if machine.cpus is not None:
        words.append(f"{machine.cpus} CPU cores")
    if machine.memory_bytes is not None:
        words.append(f"{gigabytes(machine.memory_bytes)} of memory")
    return ", ".join(words)
