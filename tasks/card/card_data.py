"""The front matter of a card, which the Hub reads. `model-index` has the measured values.

Source: huggingface_hub 2.4 (repocard_data.py). A result needs the type of a task, a data set's type and name, a
metric's type, and a value.
"""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from requant.tasks.card.base_card import inherited
from requant.tasks.card.facts import CardFacts
from requant.tasks.card.filters import name_characters
from requant.tasks.redaction import public
from requant.tasks.validating.measured import Measured


def card_data(facts: CardFacts) -> ModelCardData:
    """Build the front matter. Only plain values of known keys are taken from the base's card."""
    from_base = {key: value for key, value in inherited(facts.files.base_card).items() if not key.startswith("license")}
    from_base.setdefault("pipeline_tag", "image-text-to-text" if facts.vision else "text-generation")
    return ModelCardData(
        **license_of(facts),
        **from_base,
        base_model=facts.recipe.base.repo_id,
        base_model_relation="quantized",
        library_name="transformers",
        quantized_by="requant",
        tags=["auto-round", f"int{facts.bits}", f"w{facts.bits}a16", *(["mtp"] if facts.head else [])],
        model_name=facts.title,
        eval_results=eval_results(facts.measured) or None,
    )


def license_of(facts: CardFacts) -> dict[str, Any]:
    """Return the keys of the recipe's license, or of the base's if the recipe names none."""
    if facts.recipe.publish is not None and facts.recipe.publish.license is not None:
        return {"license": facts.recipe.publish.license}
    return {key: value for key, value in inherited(facts.files.base_card).items() if key.startswith("license")}


def license_name(facts: CardFacts) -> str:
    """Name the license for a sentence. Empty if it has no name."""
    license_ = license_of(facts)
    names = license_.get("license_name") or license_.get("license") or []
    return names if isinstance(names, str) else ", ".join(names)


def eval_results(measured: Measured) -> list[EvalResult]:
    """List the perplexity on the pinned text and the score in each lm-eval task, as far as they were measured."""
    text, _, revision = str(public(measured.text)).partition("@")
    rows = [("perplexity", "perplexity", text, revision, measured.behaviour.quantized.perplexity)]
    tasks = measured.evaluation.tasks if measured.evaluation else None
    for task, scores in (tasks or {}).items():
        rows.append((scores.metric.partition(",")[0], scores.metric, task, "", scores.ours))
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
        for metric, metric_name, dataset, commit, value in rows
        if value is not None and math.isfinite(value)
    ]
