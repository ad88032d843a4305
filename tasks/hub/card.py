"""The model card: every number from what was measured, every command marked as run or not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tasks.gates import Gate
from tasks.hub.markdown import code, gigabytes, plain, table
from tasks.hub.quality import HEAD, QUALITY, TASKS, head_rows, quality_rows, task_rows
from tasks.hub.serving import serving_parts, speed_parts
from tasks.pictures import FOLDER, Picture
from tasks.recipe import NOT_YAML, PACKED_HEADS, Recipe

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/+-]{0,127}")
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Why tensors are not quantized: first match wins.
REASONS = (
    (r"(^|\.)mtp\.", "MTP head: packed, it drafts worse or does not load"),
    (r"linear_attn\.in_proj_[ab]\b", "as many rows as heads: too few to pack in words"),
    (r"(^|\.)(visual|vision)", "vision tower: text calibration says nothing of it"),
    (r"(norm|layernorm|_norm)\b", "normalization: a vector, and sensitive"),
    (r"conv1d|A_log|dt_bias", "state-space parameters: tiny, and sensitive"),
    (r"embed_tokens|pos_embed", "embeddings: looked up, not multiplied"),
    (r"lm_head", "output layer: one of the most sensitive"),
    (r"(gate|router)\.weight", "router: small, and decides which expert runs"),
    (r"\.bias$", "bias: a vector"),
)


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of."""

    recipe: Recipe
    base_sha: str
    base_bytes: int
    digest: str
    size: int
    kept_names: tuple[str, ...]
    measured: Mapping[str, Any]
    gates: Iterable[Gate]
    benchmark: Mapping[str, Any]
    provenance: Mapping[str, Mapping[str, Any]]
    base_card: str
    pictures: Sequence[Picture] = ()
    chat: bool = True  # it has a chat template


def make_card(facts: CardFacts) -> str:
    """The README.md of the published repo."""
    recipe, measured = facts.recipe, facts.measured
    bits, group_size, sym = recipe.quantize.resolved
    repo = recipe.publish.repo_id if recipe.publish else "this checkpoint"
    model = recipe.publish.repo_id if recipe.publish else "."  # the folder that this card lies in
    base = recipe.base.repo_id
    head = bool(measured["head_kept"])
    pinned = str(facts.provenance.get("quantize", {}).get("calibration") or recipe.quantize.calibration)
    vision = any(re.search(r"(^|\.)(visual|vision)", name) for name in facts.kept_names)
    auto = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    parts = [
        front_matter(facts),
        f"# {repo.split('/')[-1]}",
        f"[{base}](https://huggingface.co/{base}) at `{facts.base_sha[:7]}`, weights in {bits} bits (W{bits}A16, group "
        f"size {group_size}, {'symmetric' if sym else 'asymmetric'}) by auto-round, "
        f"{gigabytes(facts.base_bytes)} to {gigabytes(facts.size)} ({facts.base_bytes / facts.size:.2f} times smaller)."
        + (" The MTP head is kept bit for bit." if head else "")
        + " Made, measured and published by Requant.",
        "## Serving",
        *serving_parts(facts.benchmark, model, head=head, chat=facts.chat, auto=auto, asked=recipe.benchmark),
        "## Quantization",
        table(("setting", "value"), _settings(facts)),
        "## What is not quantized, and why",
        table(("tensors", "count", "why"), kept_groups(facts.kept_names)),
        "## MTP head",
        *_head_text(facts, head),
        "## Against the base",
        f"Measured in torch on {measured['tokens']:,} tokens of {_public(measured['text'])}, both models alike, packed "
        "weights dequantized by their formula.",
        table(QUALITY, quality_rows(measured)),
        *_tasks_text(measured),
        "Every gate that it had to pass:",
        table(("gate", "measured", "limit", ""), [_gate_row(g) for g in facts.gates]),
        "## Speed",
        *speed_parts(facts.benchmark),
        *_pictures(facts.pictures),
        "## Limits",
        "Quality was measured on one text and against the base only. "
        + ("" if measured.get("tasks") else "No task benchmark was run. ")
        + ("No engine was run. " if facts.benchmark.get("engine") in {"none", "torch"} else "")
        + "Weights are rounded: expect small differences from the base everywhere.",
        "## Reproduce",
        "With the recipe below as `recipe.yaml` and the versions in the table:",
        code("requant run recipe.yaml"),
        code(yaml.safe_dump(_recipe_document(recipe, facts.base_sha, pinned), sort_keys=False).rstrip(), "yaml"),
        table(("stage", "seconds", "tools"), _provenance_rows(facts.provenance)),
        f"Base commit `{facts.base_sha}`, artifact digest `{facts.digest}`.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: CardFacts) -> str:
    """YAML for the Hub. Of the base's own only plain values of known keys are taken over."""
    bits, _, _ = facts.recipe.quantize.resolved
    document: dict[str, Any] = {
        **inherited(facts.base_card),
        "base_model": facts.recipe.base.repo_id,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "quantized_by": "requant",
        "tags": ["auto-round", f"int{bits}", f"w{bits}a16", *(["mtp"] if facts.measured["head_kept"] else [])],
    }
    return f"---\n{yaml.safe_dump(document, sort_keys=False)}---"


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
    for key in INHERITED:
        value = document.get(key)
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(v, str) and PLAIN.fullmatch(v) for v in values):
            kept[key] = value
    return kept


def kept_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Tensors that are not packed, each group with its reason. Numbers fold to `*`, head and vision to a row."""
    groups: dict[str, int] = {}
    for name in names:
        whole = re.match(r"(mtp|(?:model\.)?visual|(?:model\.)?vision_tower)\.", name)
        folded = f"{whole[1]}.*" if whole else re.sub(r"\.\d+\.", ".*.", name)
        groups[folded] = groups.get(folded, 0) + 1
    plain = {group: re.sub(r"[^\w.*-]", "?", group) for group in groups}
    return [(f"`{plain[group]}`", str(count), _reason(group)) for group, count in sorted(groups.items())]


def _reason(name: str) -> str:
    return next((why for pattern, why in REASONS if re.search(pattern, name)), "not a matrix of a decoder block")


def _settings(facts: CardFacts) -> list[tuple[str, ...]]:
    quantize = facts.recipe.quantize
    bits, group_size, sym = quantize.resolved
    used = facts.provenance.get("quantize", {}).get("settings", {})
    return [
        ("scheme", f"W{bits}A16, group size {group_size}, {'symmetric' if sym else 'asymmetric'}"),
        ("format", quantize.format),
        ("iterations", str(quantize.iters)),
        ("calibration", f"{quantize.nsamples} samples of {quantize.seqlen} tokens of {_public(quantize.calibration)}"),
        ("seed", str(quantize.seed)),
        *((key, str(used[key])) for key in ("device", "torch_compile", "low_gpu_mem", "batch_size") if key in used),
        ("quantized matrices", str(facts.measured["packed"])),
        ("kept tensors", str(facts.measured["kept"] + facts.measured["head"])),
    ]


def _tasks_text(measured: Mapping[str, Any]) -> list[str]:
    rows = task_rows(measured)
    return ["Tasks of lm-eval, the base beside the result:", table(TASKS, rows)] if rows else []


def _head_text(facts: CardFacts, head: bool) -> list[str]:
    if not head:
        return ["The result has no MTP head." if facts.recipe.mtp == "drop" else "The base has no MTP head."]
    measured, precision = facts.measured, facts.recipe.mtp
    what = f"Bit for bit the base's {measured['head']} tensors, in a shard of their own, excluded in both quantization "
    what += "configs."
    if precision in PACKED_HEADS:
        what = (
            f"The layers of the head are the base's, rounded to nearest and packed to {precision.upper()}; its fusion "
            f"layer, norms and whatever does not fit the packing, {measured['head']} tensors, are bit for bit "
            "the base's."
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
    shown = [f"![{plain(p.caption)}]({FOLDER}/{p.name}.png)\n\n{plain(p.caption)}" for p in pictures]
    return ["## Pictures", *shown] if shown else []


def _gate_row(gate: Gate) -> tuple[str, ...]:
    value = "not measured" if gate.value is None else f"{gate.value:.4g}"
    limit = "none" if gate.limit is None else f"{gate.limit:.4g}"
    return gate.name, value, limit, "passed" if gate.passed else "failed"


def _recipe_document(recipe: Recipe, sha: str, calibration: str) -> dict[str, Any]:
    """The recipe with base and calibration pinned to what they were."""
    document: dict[str, Any] = json.loads(recipe.model_dump_json(exclude_unset=True))
    document["base"]["revision"] = sha
    if "calibration" in document.get("quantize", {}):
        document["quantize"]["calibration"] = _public(calibration)
    if document.get("eval") and document["eval"].get("definitions"):
        document["eval"]["definitions"] = _public(document["eval"]["definitions"])
    if document.get("benchmark", {}).get("engine", "").startswith("url:"):
        document["benchmark"].pop("engine")  # somebody's server
    return document


def _public(calibration: str) -> str:
    """A local file by its name alone: folders are nobody's business."""
    return calibration.rsplit("/", 1)[1] if calibration.startswith("/") else calibration


def _provenance_rows(provenance: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (stage, f"{record.get('seconds', 0):.1f}", ", ".join(f"{k} {v}" for k, v in record.get("tools", {}).items()))
        for stage, record in provenance.items()
    ]
