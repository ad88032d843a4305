"""The card's parts on serving and speed, from the benchmark's record: commands as run, figures as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from requant.tasks.formatting import code, plain, table
from requant.tasks.recipe.engine_flags import MODEL, arguments, command_line, with_drafts, without_drafts
from requant.tasks.recipe.recipe import Benchmark
from requant.tasks.redaction import public
from requant.tasks.serving.measure import summary

NAMES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}
Engines = Mapping[str, Mapping[str, Any]]
QUESTION = "Write a Python function that reverses a list."


def serving_parts(
    benchmark: Mapping[str, Any],
    model: str,
    *,
    head: bool,
    packed_head: bool,
    chat: bool,
    auto: str,
    asked: Benchmark,
    remote_code: bool = False,
    engines: Engines,
) -> list[str]:
    """How to serve `model`, ask it, and load it. `auto` is the class of transformers; `remote_code`: it may bring its
    own; `engines`: which of them load it and draft, as far as headers and configs tell."""
    trust = ["--trust-remote-code"] if remote_code else []
    refused = {engine: why for engine in NAMES if (why := _refusal(engines, engine, "loads"))}
    if benchmark.get("commands"):
        refused.pop("vllm", None)  # it did
    drafts = head and not packed_head and not _refusal(engines, "sglang", "mtp")
    parts = [f"{NAMES[engine]} does not load it: {why}." for engine, why in refused.items()]
    if "vllm" not in refused:
        parts += _vllm(benchmark, model, asked, trust, _refusal(engines, "vllm", "mtp"), mtp=True) if head else []
        parts += _vllm(benchmark, model, asked, trust, None, mtp=False)
    if not {"vllm", "sglang"} <= refused.keys():
        parts += [
            "It speaks OpenAI's API. This request was **not run** as it stands here; Requant's tests run it, on a "
            "small model.",
            code(_curl(model, chat=chat)),
        ]
    if "sglang" not in refused:
        parts += [
            f"SGLang{' with its MTP head' if drafts else ''}. This command was **not run**.",
            code(_sglang(model, trust, asked.draft_tokens if drafts else 0)),
        ]
    if "transformers" not in refused:
        parts += [
            f"transformers{', which does not use the MTP head' if head else ''}. This was **not run** as it stands "
            "here; Requant's tests run it, on a small model.",
            code(_transformers(model, auto, chat=chat, remote_code=remote_code), "python"),
        ]
    return parts


def _refusal(engines: Engines, engine: str, what: str) -> str | None:
    """Why an engine does not load it (`loads`) or draft (`mtp`); None if it does, or nobody knows."""
    verdict = engines.get(engine)
    return None if verdict is None or verdict[what] else plain(verdict["reason"])


def _vllm(
    benchmark: Mapping[str, Any], model: str, asked: Benchmark, trust: Sequence[str], refused: str | None, *, mtp: bool
) -> list[str]:
    """The command as the benchmark ran it, or, marked so, as it would have."""
    name = f"vLLM with{'' if mtp else 'out'} MTP"
    ran = next((command["words"] for command in benchmark.get("commands", ()) if command["mtp"] is mtp), None)
    if ran is None and refused is not None:
        return [f"vLLM does not draft with its MTP head: {refused}."]
    if ran is None:
        flags = with_drafts(asked.flags, asked.draft_tokens) if mtp else without_drafts(asked.flags)
        words = ["vllm", "serve", MODEL, *trust, *arguments(flags)]
        return [f"{name}. This command was **not run** by the pipeline that made this card.", _shown(words, model)]
    where = f"{benchmark['version']}, {benchmark['hardware']}"
    said = f"{name}. This command was **run** by the pipeline that made this card ({where}), on these very files"
    return [f"{said}; the speeds below are its.", _shown(ran, model)]


def _shown(words: Sequence[str], model: str) -> str:
    """A command to copy. What names a file of the machine that ran it is cut to the file's name."""
    return code(command_line(public(list(words)), model))


def _sglang(model: str, trust: Sequence[str], draft_tokens: int) -> str:
    """Its flags for a model's own MTP layers: https://docs.sglang.io/docs/advanced_features/speculative_decoding"""
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, *trust]
    if draft_tokens:
        words += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(draft_tokens)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(draft_tokens + 1)]
    return command_line(words, model)


def _curl(model: str, *, chat: bool) -> str:
    path, asked = "completions", f'"prompt": "# {QUESTION}"'
    if chat:
        path, asked = "chat/completions", f'"messages": [{{"role": "user", "content": "{QUESTION}"}}]'
    return (
        f'curl "${{OPENAI_BASE_URL:-http://localhost:8000/v1}}/{path}" \\\n'
        '  -H "Content-Type: application/json" \\\n'
        f'  -d \'{{"model": "{model}", {asked}, "max_tokens": 200}}\''
    )


def _transformers(model: str, auto: str, *, chat: bool, remote_code: bool) -> str:
    trust = ", trust_remote_code=True" if remote_code else ""
    inputs = f'inputs = tokenizer("# {QUESTION}", return_tensors="pt")'
    if chat:
        inputs = (
            f'messages = [{{"role": "user", "content": "{QUESTION}"}}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    return (
        f"from transformers import {auto}, AutoTokenizer  # and auto-round, which unpacks the weights\n\n"
        f'model = {auto}.from_pretrained("{model}", device_map="auto"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model}"{trust})\n'
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
    lines = ["A server that ran already, whose flags are not known; tokens per second of output."]
    if "version" in benchmark:
        where = f"{benchmark['version']} on {benchmark['hardware']}"
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
