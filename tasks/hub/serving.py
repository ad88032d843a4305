"""The card's parts on serving and speed, from the benchmark's record: commands as run, figures as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.hub.markdown import code, table
from tasks.recipe import Benchmark
from tasks.serving.flags import MODEL, arguments, command_line, with_drafts, without_drafts
from tasks.serving.measure import summary

QUESTION = "Write a Python function that reverses a list."


def serving_parts(
    benchmark: Mapping[str, Any], model: str, *, head: bool, chat: bool, auto: str, asked: Benchmark
) -> list[str]:
    """How to serve `model`, ask it, and load it. `auto` is the class of transformers."""
    ran = [command["words"] for command in benchmark.get("commands", ())]  # the one with MTP is last
    flags = with_drafts(asked.flags, asked.draft_tokens) if head else without_drafts(asked.flags)
    words = ran[-1] if ran else ["vllm", "serve", MODEL, *arguments(flags)]
    said = "This command was **not run** by the pipeline that made this card."
    if ran:
        said = f"This command was **run** by the pipeline that made this card ({benchmark['version']}, "
        said += f"{benchmark['hardware']}); the speeds below are its."
    return [
        said,
        code(command_line(words, model)),
        "It speaks OpenAI's API:",
        code(_curl(model, chat=chat)),
        "In transformers, which does not use the MTP head:" if head else "In transformers:",
        code(_transformers(model, auto, chat=chat), "python"),
        "These two were **not run** by the pipeline: Requant's own tests run them, on a small model.",
    ]


def _curl(model: str, *, chat: bool) -> str:
    path, asked = "completions", f'"prompt": "# {QUESTION}"'
    if chat:
        path, asked = "chat/completions", f'"messages": [{{"role": "user", "content": "{QUESTION}"}}]'
    return (
        f'curl "${{OPENAI_BASE_URL:-http://localhost:8000/v1}}/{path}" \\\n'
        '  -H "Content-Type: application/json" \\\n'
        f'  -d \'{{"model": "{model}", {asked}, "max_tokens": 200}}\''
    )


def _transformers(model: str, auto: str, *, chat: bool) -> str:
    inputs = f'inputs = tokenizer("# {QUESTION}", return_tensors="pt")'
    if chat:
        inputs = (
            f'messages = [{{"role": "user", "content": "{QUESTION}"}}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    return (
        f"from transformers import {auto}, AutoTokenizer  # and auto-round, which unpacks the weights\n\n"
        f'model = {auto}.from_pretrained("{model}", device_map="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model}")\n'
        f"{inputs}\n"
        "output = model.generate(**inputs.to(model.device), max_new_tokens=200)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    )


def speed_parts(benchmark: Mapping[str, Any]) -> list[str]:
    """What was measured of the speed, in words and in a table."""
    engine = benchmark.get("engine")
    if engine == "none":
        return ["Not measured."]
    if engine == "torch":
        return [
            f"{benchmark['version']}, batch 1, no speculative decoding, on {benchmark['hardware']}: "
            f"{benchmark['prefill_tokens_per_second']:.0f} tokens per second of prompt, "
            f"{benchmark['tokens_per_second']:.1f} decoded. This is no engine's figure."
        ]
    where = f"{benchmark['version']} on {benchmark['hardware']}" if "version" in benchmark else "A server"
    lines = [f"{where}, tokens per second of output, {_tokens(benchmark)} a draft."]
    rows = benchmark["prompts"]
    at_once = sorted({row["concurrency"] for row in rows})
    header = ("requests", "without MTP", "with MTP", "times", "drafts accepted")
    cases = [(sampling, number) for sampling in benchmark["sampling"] for number in at_once]
    lines.append(table(header, [_case(rows, sampling, number) for sampling, number in cases]))
    header = ("prompt, greedy, alone", "tokens", "without MTP", "with MTP", "drafts accepted")
    lines.append(table(header, _prompts(rows)))
    sampled = ", ".join(f"{name} {value}" for name, value in benchmark["sampling"]["sampled"].items())
    lines.append(
        f"Sampled means {sampled}. Every answer has the same number of tokens: the end of text is passed over."
    )
    return lines


def _tokens(benchmark: Mapping[str, Any]) -> str:
    number = benchmark.get("draft_tokens", 1)
    return "one token" if number == 1 else f"{number} tokens"


def _case(rows: Sequence[Mapping[str, Any]], sampling: str, number: int) -> tuple[str, ...]:
    off, on = (summary(rows, mtp=mtp, sampling=sampling, concurrency=number) for mtp in (False, True))
    times = f"{on['tokens_per_second'] / off['tokens_per_second']:.2f}" if on and off else "-"
    words = f"{sampling}, {'one at a time' if number == 1 else f'{number} at once'}"
    return words, _speed(off), _speed(on), times, _share(on["acceptance"] if on else None)


def _prompts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    alone = [row for row in rows if row["sampling"] == "greedy" and row["concurrency"] == 1]
    found: dict[tuple[str, str], dict[bool, Mapping[str, Any]]] = {}
    for row in alone:
        found.setdefault((row["set"], row["name"]), {})[row["mtp"]] = row
    return [
        (
            f"{name[0]}: {name[1]}",
            str(next(iter(modes.values()))["tokens"]),
            _speed(modes.get(False)),
            _speed(modes.get(True)),
            _share(modes[True]["acceptance"] if True in modes else None),
        )
        for name, modes in found.items()
    ]


def _speed(row: Mapping[str, Any] | None) -> str:
    return f"{row['tokens_per_second']:.1f}" if row else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
