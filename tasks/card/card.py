"""The model card: every number from what was measured, every command marked as run or not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from requant.tasks.artifact import PICTURES
from requant.tasks.card.facts import CardFacts, scheme_words
from requant.tasks.card.origin import calibration_of, license_parts, origin_parts
from requant.tasks.card.quality import HEAD, QUALITY, TASKS, head_rows, quality_rows, task_rows
from requant.tasks.card.serving import serving_parts, speed_parts
from requant.tasks.formatting import gigabytes, named, plain, table
from requant.tasks.measuring.gates import Gate
from requant.tasks.planning.reasons import kept_groups
from requant.tasks.plots import Picture
from requant.tasks.recipe.recipe import NOT_YAML, PACKED_HEADS
from requant.tasks.redaction import public

# Settings of the quantize stage as they came to be, from its record.
USED = ("device", "torch_compile", "low_gpu_mem", "batch_size")
# What is taken over of the base's front matter, as the Hub allows it.
INHERITED = {
    "license": r"[a-z0-9][a-z0-9.+-]{0,63}",
    "license_name": r"[a-z0-9][a-z0-9.-]{0,63}",
    "license_link": r"LICENSE|LICENSE\.md|https://[A-Za-z0-9.-]{1,100}(/[A-Za-z0-9._~/+-]{0,150})?",
    "language": r"[a-z]{2,3}(-[A-Za-z]{2,8})?|multilingual|code",
    "pipeline_tag": r"[a-z0-9]{1,30}(-[a-z0-9]{1,30}){0,8}",
}


def make_card(facts: CardFacts) -> str:
    """The README.md of the published repo."""
    recipe, measured = facts.recipe, facts.measured
    repo = recipe.publish.repo_id if recipe.publish else "this checkpoint"
    model = recipe.publish.repo_id if recipe.publish else "."  # the folder that this card lies in
    parts = [
        front_matter(facts),
        f"# {repo.split('/')[-1]}",
        "## TL;DR",
        *_summary(facts),
        "## Serving",
        *serving_parts(
            facts.benchmark,
            model,
            head=facts.head,
            packed_head=recipe.mtp in PACKED_HEADS,
            chat=facts.chat,
            auto="AutoModelForImageTextToText" if facts.vision else "AutoModelForCausalLM",
            asked=recipe.benchmark,
            remote_code=recipe.allow_remote_code,
            engines=facts.engines,
        ),
        "## Quantization",
        table(("setting", "value"), _settings(facts)),
        "## What is not quantized, and why",
        table(("tensors", "count", "why"), kept_groups(facts.kept_names, facts.why)),
        "## MTP head",
        *_head_text(facts),
        "## Against the base",
        f"Measured in torch on {measured['tokens']:,} tokens of {_named_text(measured['text'])}, both models alike, "
        "packed weights dequantized by their formula.",
        table(QUALITY, quality_rows(measured)),
        *_tasks_text(measured),
        "Every gate that it had to pass:",
        table(("gate", "measured", "limit", ""), [_gate_row(g) for g in facts.gates]),
        "## Speed",
        *speed_parts(facts.benchmark),
        *_pictures(facts.pictures),
        *_others(facts),
        "## Limits",
        _limits(facts),
        *origin_parts(facts),
        *license_parts(recipe.base.repo_id, license_of(facts), facts.base_card),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(facts: CardFacts) -> list[str]:
    """What it is, what it costs and what it gains, in sentences whose numbers stand below again."""
    base, measured = facts.recipe.base.repo_id, facts.measured
    bits, _, _ = facts.recipe.quantize.resolved
    lines = [
        f"{_linked(base)} at `{facts.base.sha[:7]}`, weights in {bits} bits ({facts.scheme}) "
        f"by auto-round: {gigabytes(facts.base_bytes)} to {gigabytes(facts.size)} "
        f"({facts.base_bytes / facts.size:.2f} times smaller)."
    ]
    if facts.head:
        kept = "kept in BF16" if facts.fp8 else "kept bit for bit"
        done = "packed, see below" if facts.recipe.mtp in PACKED_HEADS else kept
        lines.append(f"MTP head {done}, for speculative decoding.")
    if measured.get("top1_agreement") is not None and measured.get("perplexity_increase") is not None:
        lines.append(
            f"Same next token as the base in {measured['top1_agreement']:.1%} of places, perplexity "
            f"{measured['perplexity_increase']:+.1%}."
        )
    speedup = (facts.benchmark.get("mtp") or {}).get("speedup")
    if speedup is not None:
        on = facts.benchmark["mtp"]["on"]
        taken = "" if on["acceptance"] is None else f", {on['acceptance']:.0%} of drafts accepted"
        lines.append(f"With MTP {speedup:.2f} times as fast as without, greedily, one request at a time{taken}.")
    return ["\n".join(f"- {line}" for line in lines)]


def _limits(facts: CardFacts) -> str:
    engine = facts.benchmark.get("engine")
    return (
        "Quality was measured on one text and against the base only. "
        + ("" if facts.measured.get("tasks") else "No task benchmark was run. ")
        + ("No engine was run. " if engine in {"none", "torch"} else "")
        + ("The vision tower is the base's; no image benchmark was run. " if facts.vision else "")
        + (
            f"{len(facts.base.left_out)} files of the base were left out: no file here can have their names. "
            if facts.base.left_out
            else ""
        )
        + "Weights are rounded: expect small differences from the base everywhere."
    )


def front_matter(facts: CardFacts) -> str:
    """YAML for the Hub. Of the base's own only plain values of known keys are taken over."""
    bits, _, _ = facts.recipe.quantize.resolved
    document: dict[str, Any] = {
        **license_of(facts),
        **{key: value for key, value in inherited(facts.base_card).items() if not key.startswith("license")},
        "base_model": facts.recipe.base.repo_id,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "quantized_by": "requant",
        "tags": ["auto-round", f"int{bits}", f"w{bits}a16", *(["mtp"] if facts.head else [])],
    }
    document.setdefault("pipeline_tag", "image-text-to-text" if facts.vision else "text-generation")
    return f"---\n{yaml.safe_dump(document, sort_keys=False)}---"


def license_of(facts: CardFacts) -> dict[str, Any]:
    """The license as the front matter has it: the recipe's, else the base's."""
    if facts.recipe.publish is not None and facts.recipe.publish.license is not None:
        return {"license": facts.recipe.publish.license}
    return {key: value for key, value in inherited(facts.base_card).items() if key.startswith("license")}


def inherited(base_card: str) -> dict[str, Any]:
    """license, language and pipeline_tag of a base's card, if they are plain words."""
    match = re.match(r"---\r?\n(.{0,65536}?)\r?\n---", base_card, re.DOTALL)
    try:
        document = yaml.safe_load(match[1]) if match else None
    except NOT_YAML:
        document = None
    if not isinstance(document, dict):
        return {}
    kept: dict[str, Any] = {}
    for key, pattern in INHERITED.items():
        value = document.get(key)
        values = value if isinstance(value, list) else [value]
        several = isinstance(value, list) and key not in {"license", "language"}
        if values and not several and all(isinstance(v, str) and re.fullmatch(pattern, v) for v in values):
            kept[key] = value
    return kept


def _settings(facts: CardFacts) -> list[tuple[str, ...]]:
    quantize = facts.recipe.quantize
    used = facts.provenance.get("quantize", {}).get("settings", {})
    samples = f"{quantize.nsamples} samples of {quantize.seqlen} tokens of {_named_text(calibration_of(facts))}"
    return [
        ("scheme", facts.scheme),
        ("format", quantize.format),
        *([("packing", facts.packing)] if facts.packing else []),
        *(
            [("base", "FP8: read, and kept where it is not packed, as the BF16 that its scales give")]
            if facts.fp8
            else []
        ),
        ("iterations", "0: rounded to nearest" if quantize.iters == 0 else str(quantize.iters)),
        *([("step size", str(quantize.lr))] if quantize.lr is not None else []),
        ("calibration", samples),
        ("seed", str(quantize.seed)),
        *((key, str(public(used[key]))) for key in USED if key in used),
        *([("layers of their own", ", ".join(map(named, sorted(quantize.layers))))] if quantize.layers else []),
        ("quantized matrices", str(facts.measured["packed"])),
        ("kept tensors", str(facts.measured["kept"] + facts.measured["head"])),
    ]


def _tasks_text(measured: Mapping[str, Any]) -> list[str]:
    rows = task_rows(measured)
    return ["Tasks of lm-eval, the base beside the result:", table(TASKS, rows)] if rows else []


def _head_text(facts: CardFacts) -> list[str]:
    if not facts.head:
        dropped = (facts.provenance.get("mtp_fix", {}).get("mtp") or {}).get("in_base")
        why = ": the base's was left out, as the recipe says" if dropped else ""
        return [f"The result has no MTP head{why}." if facts.recipe.mtp == "drop" else "The base has no MTP head."]
    measured, precision = facts.measured, facts.recipe.mtp
    same = "the base's, FP8 as BF16" if facts.fp8 else "bit for bit the base's"
    what = f"All {measured['head']} tensors are {same}, in a shard of their own, excluded in both quantization configs."
    if precision in PACKED_HEADS:
        what = (
            f"The layers of the head are the base's, rounded to nearest and packed to {precision.upper()}; its fusion "
            f"layer, norms and whatever does not fit the packing, {measured['head']} tensors, are {same}."
        )
    if measured["mtp_acceptance"] is None:
        return [f"{what} Its acceptance was not measured."]
    return [
        what,
        "Share of steps that take each draft and all before it, measured in torch: after the pinned text as it stands, "
        "and decoding greedily after its beginnings, where the model writes what is easy for it. Other text differs.",
        table(HEAD, head_rows(measured)),
    ]


def _pictures(pictures: Sequence[Picture]) -> list[str]:
    shown = [f"![{plain(p.caption)}]({PICTURES}/{p.name}.png)\n\n{plain(p.caption)}" for p in pictures]
    return ["## Pictures", *shown] if shown else []


def _others(facts: CardFacts) -> list[str]:
    """What the same recipe makes beside this, whatever became of it: so one card is the same in every run."""
    headless = not facts.head and facts.recipe.mtp != "drop"  # and so is the base
    rows = [
        (
            _linked(one.publish.repo_id),
            scheme_words(one.quantize),
            one.quantize.format,
            str(one.quantize.iters),
            "none" if headless else one.mtp,
        )
        for one in facts.others.values()
        if one.publish
    ]
    if not rows:
        return []
    return [
        "## Other quantizations of this base",
        "The same recipe makes these too; each is published once it passes its own gates:",
        table(("repo", "scheme", "format", "iterations", "MTP head"), rows),
    ]


def _linked(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


def _gate_row(gate: Gate) -> tuple[str, ...]:
    value = "not measured" if gate.value is None else f"{gate.value:.4g}"
    limit = "none" if gate.limit is None else f"{gate.limit:.4g}"
    return gate.name, value, limit, "no limit" if gate.passed and gate.limit is None else gate.result


def _named_text(name: object) -> str:
    """A text by its name; a local file without the folder it lies in."""
    return re.sub(r"[^\w .:@/-]", "?", str(public(name)))
