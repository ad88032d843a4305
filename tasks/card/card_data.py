"""The front matter of a card: what the Hub reads of it, with the measured values as `model-index`.

Source: huggingface_hub 2.4 (repocard_data.py). A result needs the type of a task, a data set's type and name, a
metric's type, and a value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from requant.tasks.card.base_card import inherited
from requant.tasks.card.facts import CardFacts
from requant.tasks.card.filters import name_characters
from requant.tasks.redaction import public


def card_data(facts: CardFacts) -> ModelCardData:
    """Build the front matter. From the base's card come plain values of known keys, and nothing else."""
    taken = {key: value for key, value in inherited(facts.files.base_card).items() if not key.startswith("license")}
    taken.setdefault("pipeline_tag", "image-text-to-text" if facts.vision else "text-generation")
    return ModelCardData(
        **license_of(facts),
        **taken,
        base_model=facts.recipe.base.repo_id,
        base_model_relation="quantized",
        library_name="transformers",
        quantized_by="requant",
        tags=["auto-round", f"int{facts.bits}", f"w{facts.bits}a16", *(["mtp"] if facts.head else [])],
        model_name=facts.title,
        eval_results=eval_results(facts.measured) or None,
    )


def license_of(facts: CardFacts) -> dict[str, Any]:
    """Take the recipe's license, else the base's."""
    if facts.recipe.publish is not None and facts.recipe.publish.license is not None:
        return {"license": facts.recipe.publish.license}
    return {key: value for key, value in inherited(facts.files.base_card).items() if key.startswith("license")}


def license_name(facts: CardFacts) -> str:
    """Name the license as a sentence does; empty where none is named."""
    license_ = license_of(facts)
    names = license_.get("license_name") or license_.get("license") or []
    return names if isinstance(names, str) else ", ".join(names)


def eval_results(measured: Mapping[str, Any]) -> list[EvalResult]:
    """List the perplexity on the pinned text and the score in each lm-eval task, as far as they were measured."""
    name, _, revision = str(public(measured["text"])).partition("@")
    found = [("perplexity", "perplexity", name, revision, measured.get("perplexity"))]
    for task, scores in (measured.get("tasks") or {}).items():
        found.append((scores["metric"].partition(",")[0], scores["metric"], task, "", scores["ours"]))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name_characters(dataset),
            dataset_name=name_characters(dataset),
            dataset_revision=name_characters(commit) or None,
            metric_type=name_characters(metric),
            metric_name=name_characters(metric_name),
            metric_value=round(value, 4),
        )
        for metric, metric_name, dataset, commit, value in found
        if value is not None and math.isfinite(value)
    ]
