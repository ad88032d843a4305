"""Rows of tables: for the card, and the first three for a run's report too. Each has its header beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant.tasks.card.filters import escape, named, number
from requant.tasks.formatting import gigabytes
from requant.tasks.serving.measure import summary

QUALITY_COLUMNS = ("", "base", "quantized", "95 % of the time between")
DRAFT_COLUMNS = ("draft", "base", "quantized", "base, on its own text", "quantized, on its own text")
TASKS = ("task", "metric", "base", "quantized", "recovery")
SPEED = ("requests", "without MTP", "with MTP", "speedup", "draft acceptance rate")
PROMPTS = ("prompt, greedy, alone", "tokens", "without MTP", "with MTP", "draft acceptance rate")
Row = tuple[str, ...]


def quality_rows(measured: Mapping[str, Any]) -> list[Row]:
    """Compare what was measured of both models, with the quantized one's 95 % interval where there is one."""
    rows = [
        ("perplexity", "base_perplexity", "perplexity", "perplexity_interval", ".4f"),
        ("perplexity over the base's, minus 1", "", "perplexity_increase", "perplexity_increase_interval", ".2%"),
        ("KL divergence, nats", "", "kl_divergence", "", ".4f"),
        ("KL divergence, 99 % of places below", "", "kl_divergence_p99", "", ".4f"),
        ("same next token", "", "top1_agreement", "", ".2%"),
        ("first draft accepted", "base_mtp_acceptance", "mtp_acceptance", "", ".1%"),
    ]
    return [
        (
            name,
            number(measured.get(base), form),
            number(measured.get(ours), form),
            " and ".join(number(end, form) for end in measured.get(interval) or []),
        )
        for name, base, ours, interval, form in rows
        if measured.get(ours) is not None
    ]


def head_rows(measured: Mapping[str, Any]) -> list[Row]:
    """Compare the shares of steps that accept each draft and all before it, on the pinned text and on greedy text."""
    kinds = ("base_mtp", "mtp", "base_greedy", "greedy")
    columns = [measured.get(f"{kind}_acceptance_by_position") or [] for kind in kinds]
    return [
        (str(place + 1), *(number(column[place] if place < len(column) else None, ".1%") for column in columns))
        for place in range(max(map(len, columns)))
    ]


def task_rows(measured: Mapping[str, Any]) -> list[Row]:
    """Compare the scores of both models in lm-eval tasks."""
    return [
        (
            named(name),
            escape(task["metric"]),
            number(task["base"], ".4g"),
            number(task["ours"], ".4g"),
            number(task["recovery"], ".1%") or "none",
        )
        for name, task in (measured.get("tasks") or {}).items()
    ]


def speed_rows(benchmark: Mapping[str, Any]) -> list[Row]:
    """Compare output tokens per second without and with MTP, for each sampling and number of requests at once."""
    prompts = benchmark["prompts"]
    rows: list[Row] = []
    for sampling in benchmark["sampling"]:
        for at_once in sorted({row["concurrency"] for row in prompts}):
            off, on = (summary(prompts, mtp=mtp, sampling=sampling, concurrency=at_once) for mtp in (False, True))
            speedup = on["tokens_per_second"] / off["tokens_per_second"] if on and off else None
            words = f"{sampling}, {'one at a time' if at_once == 1 else f'{at_once} at once'}"
            rows.append((words, _speed(off), _speed(on), number(speedup, ".2f") or "-", _acceptance(on)))
    return rows


def prompt_rows(benchmark: Mapping[str, Any]) -> list[Row]:
    """Compare output tokens per second for each prompt, decoded greedily, one request at a time."""
    prompts: dict[tuple[str, str], dict[bool, Mapping[str, Any]]] = {}
    for row in benchmark["prompts"]:
        if row["sampling"] == "greedy" and row["concurrency"] == 1:
            prompts.setdefault((row["set"], row["name"]), {})[row["mtp"]] = row
    return [
        (
            f"{name[0]}: {name[1]}",
            str(next(iter(modes.values()))["tokens"]),
            _speed(modes.get(False)),
            _speed(modes.get(True)),
            _acceptance(modes.get(True)),
        )
        for name, modes in prompts.items()
    ]


def stage_rows(provenance: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """List each stage's seconds, hardware and tools, from its record."""
    return [
        (
            name,
            number(record.get("seconds", 0), ".1f"),
            escape(_hardware(record)),
            escape(", ".join(f"{tool} {version}" for tool, version in (record.get("tools") or {}).items())),
        )
        for name, record in provenance.items()
    ]


def _speed(row: Mapping[str, Any] | None) -> str:
    return number(row["tokens_per_second"], ".1f") if row else "-"


def _acceptance(row: Mapping[str, Any] | None) -> str:
    return number(row["acceptance"], ".1%") or "-" if row else "-"


def _hardware(record: Mapping[str, Any]) -> str:
    """Name the device that the stage used, where it says so, and the machine around it."""
    machine = record.get("machine") or {}
    device = (record.get("settings") or {}).get("device") or (record.get("measured") or {}).get("hardware")
    words = [str(device)] if device and not str(device).lower().startswith("cpu") else []
    if "cpus" in machine:
        words.append(f"{machine['cpus']} CPU cores")
    if "memory_bytes" in machine:
        words.append(f"{gigabytes(machine['memory_bytes'])} of memory")
    return ", ".join(words)
