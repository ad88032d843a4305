"""The front matter of a card, which the Hub reads. `model-index` has the measured values.

Source: huggingface_hub 2.4 (repocard_data.py). A result needs the type of a task, a data set's type and name, a
metric's type, and a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from requant.tasks.card.base_card import inherited
from requant.tasks.card.facts import CardFacts
from requant.tasks.card.filters import name_characters
from requant.tasks.redaction import public
from requant.tasks.validating.measured import Measured

KL_NAME = "KL divergence from the base, in nats"


def card_data(facts: CardFacts) -> ModelCardData:
    """Build the front matter. Only plain values of known keys are taken from the base's card."""
    from_base = {key: value for key, value in inherited(facts.files.base_card).items() if not key.startswith("license")}
    from_base.setdefault("pipeline_tag", "image-text-to-text" if facts.vision else "text-generation")
    return ModelCardData(
        **license_of(facts),
        **from_base,
        base_model=facts.base_models or None,
        base_model_relation=facts.base_relation if facts.base_models else None,
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


@dataclass(frozen=True)
class _Result:
    """An evaluation result of the card. `domain` is a part of the data set, or empty."""

    metric: str
    metric_name: str
    dataset: str
    value: float | None
    revision: str = ""
    domain: str = ""


def eval_results(measured: Measured) -> list[EvalResult]:
    """List perplexity and KL divergence on the pinned text, by domain if it has any, and the score in each task."""
    text, _, revision = str(public(measured.text)).partition("@")
    results = [_Result("perplexity", "perplexity", text, measured.behaviour.quantized.perplexity, revision)]
    domains = measured.divergence.domains or {}
    for domain, values in domains.items() if len(domains) > 1 else ():
        results.append(_Result("perplexity", "perplexity", text, values.perplexity, revision, domain))
        results.append(_Result("kl_divergence", KL_NAME, text, values.kl_divergence, revision, domain))
    for task, scores in (measured.evaluation.tasks or {} if measured.evaluation else {}).items():
        results.append(_Result(scores.metric.partition(",")[0], scores.metric, task, scores.ours))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name_characters(result.dataset),
            dataset_name=name_characters(f"{result.dataset}, {result.domain}" if result.domain else result.dataset),
            dataset_config=name_characters(result.domain) or None,
            dataset_revision=name_characters(result.revision) or None,
            metric_type=name_characters(result.metric),
            metric_name=name_characters(result.metric_name),
            metric_value=round(result.value, 4),
        )
        for result in results
        if result.value is not None and math.isfinite(result.value)
    ]
