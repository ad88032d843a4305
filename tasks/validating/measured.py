"""The values that validate measures, as gates, report, card and pictures read them.

Their JSON form is one flat object: the artifact `validation.json`, and `measured` in the document of `requant run`. Its
keys are a contract. A value that could not be measured is null; a key that has no meaning for a checkpoint is absent.
To tell the two apart, a part writes the fields that were set, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from requant.tasks.documents import StoredDocument, is_none
from requant.tasks.validating.paired import Comparison

# A number that is not finite is null in the document of a run, since JSON has no NaN.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
Interval = tuple[Number, Number]
# The keys are written in this order, so that equal values have equal bytes in the store.
KEYS = (
    "text", "texts", "packed", "kept", "head", "unaccounted", "altered", "not_finite", "not_finite_in_base", "files",
    "context", "differences", "head_kept", "vision", "matrices", "blocks", "same_tokens", "perplexity_increase",
    "kl_divergence", "top1_agreement", "most_repeated_token", "long_context", "vision_difference",
    "mtp_acceptance_ratio", "speculative_agreement", "base_most_repeated_token", "base_long_context",
    "base_speculative_agreement", "tasks", "worst_task_recovery", "tasks_engine", "tokens", "perplexity",
    "perplexity_interval", "base_perplexity", "base_perplexity_interval", "perplexity_increase_interval",
    "long_context_tokens", "mtp_acceptance", "base_mtp_acceptance", "mtp_acceptance_by_position",
    "base_mtp_acceptance_by_position", "greedy_acceptance_by_position", "base_greedy_acceptance_by_position",
    "kl_divergence_p99", "kl_noise_floor", "domains", "not_measured", "not_computed",
)  # fmt: skip


class Audit(StoredDocument):
    """The comparison of all tensors and files with the base's, without running either model.

    Every list holds sentences. All but `differences` and `not_finite_in_base` must be empty for a sound checkpoint.
    """

    packed: int = Field(0, description="Matrices that are quantized")
    kept: int = Field(0, description="Tensors that are the base's, without those of the MTP head")
    head: int = Field(0, description="Tensors of the MTP head that are the base's")
    unaccounted: tuple[str, ...] = Field((), description="Missing, surplus and contradictory tensors and settings")
    altered: tuple[str, ...] = Field((), description="Tensors that are not quantized, and differ from the base's")
    not_finite: tuple[str, ...] = Field((), description="Tensors and scales that hold NaN or infinity")
    not_finite_in_base: tuple[str, ...] = Field((), description="Kept tensors with NaN or infinity in the base too")
    files: tuple[str, ...] = Field((), description="Files other than weights and configs that differ from the base's")
    context: tuple[str, ...] = Field((), description="Settings of context length and rotary embeddings that differ")
    differences: tuple[str, ...] = Field((), description="Differences that change nothing that is computed")


class MatrixError(StoredDocument):
    """The distance of one quantized matrix Q from the base's W. See `tasks/checkpoint/weight_error.py`.

    The last three compare it with a rounding of W by Q's own scales. Records of earlier versions do not have them.
    """

    name: str = Field(description="The name of the base's tensor")
    bits: int = Field(description="Bits of a quantized weight")
    slope: Number = Field(description="<Q, W> / <W, W>; 1, or less where rounding clips")
    offset: Number = Field(description="Mean of Q - W, in steps of the scale")
    error: Number = Field(description="|Q - W| / |W|")
    slope_excess: float | None = Field(None, description="The slope minus that of the rounding")
    scale_factor: float | None = Field(None, description="The factor by which the scales of Q are too large")
    rounding_noise: float | None = Field(None, description="|R - W|^2 / |W|^2 of the rounding R")


class BlockError(StoredDocument):
    """The distance of one decoder block from the base's."""

    block: int = Field(description="Index of the block")
    kind: str = Field(description="Its entry in the config's `layer_types`, or `decoder`")
    error: Number = Field(
        description="Error of its output, given the base's input, relative to what the block adds to the hidden states"
    )
    drift: Number = Field(
        description="Error of the hidden states after it in the quantized model, relative to the base's"
    )


class DomainValues(StoredDocument):
    """The comparison of both models on one domain of the text. Shares are of 1.

    An interval is the 95 % interval of other windows of this kind, and is null for a domain of few windows. Values of
    drafts are null without a head, and the ratio also where none of the base's drafts is accepted.
    """

    tokens: int = Field(description="Number of tokens of the domain that were measured")
    base_perplexity: Number = Field(description="Perplexity per token of the base")
    base_perplexity_interval: Interval | None = Field(None, description="Its interval")
    perplexity: Number = Field(description="Perplexity per token of the quantized model")
    perplexity_interval: Interval | None = Field(None, description="Its interval")
    perplexity_increase: Number = Field(description="Perplexity divided by the base's, minus 1")
    perplexity_increase_interval: Interval | None = Field(None, description="Its interval")
    kl_divergence: Number = Field(description="Mean KL(base || quantized) of the next token, in nats")
    kl_divergence_interval: Interval | None = Field(None, description="Its interval")
    kl_divergence_p99: Number = Field(description="99 % quantile of the same, in nats")
    kl_divergence_p99_interval: Interval | None = Field(None, description="Its interval")
    kl_noise_floor: float | None = Field(
        None, description="Mean KL divergence of the base from itself, computed in another way; null if not measured"
    )
    top1_agreement: Number = Field(description="Share of places at which both choose the same next token")
    top1_agreement_interval: Interval | None = Field(None, description="Its interval")
    base_mtp_acceptance: float | None = Field(None, description="Draft acceptance rate of the base's first draft")
    base_mtp_acceptance_interval: Interval | None = Field(None, description="Its interval")
    mtp_acceptance: float | None = Field(None, description="Draft acceptance rate of the quantized model's first draft")
    mtp_acceptance_interval: Interval | None = Field(None, description="Its interval")
    mtp_acceptance_ratio: float | None = Field(None, description="Draft acceptance rate divided by the base's")
    mtp_acceptance_ratio_interval: Interval | None = Field(None, description="Its interval")


class NoiseFloor(StoredDocument):
    """How far a base is from itself, computed in another way: mean KL divergences of the next token, in nats."""

    kl_divergence: Number = Field(description="Over all windows that were computed again")
    domains: dict[str, Number] = Field(description="Over those of each domain")
    dtype: str = Field(description="The precision in which they were computed again")


class Divergence(StoredDocument):
    """The distances of decoder blocks, distributions and vision features from the base's, on the same tokens."""

    blocks: tuple[BlockError, ...] | None = Field(None, description="The decoder blocks in their order")
    kl_divergence: float | None = Field(None, description="Mean KL(base || quantized) of the next token, in nats")
    kl_divergence_p99: float | None = Field(None, description="99 % quantile of the same, in nats")
    kl_noise_floor: float | None = Field(
        None, description="Mean KL divergence of the base from itself, computed in another way, in nats"
    )
    vision_difference: float | None = Field(
        None, description="Largest difference of a vision feature of one synthetic image; null without such features"
    )
    domains: dict[str, DomainValues] | None = Field(None, description="The comparison by domain of the text")


class Side(StoredDocument):
    """The behaviour of one of the two models on the text.

    A draft acceptance rate is a share of 1: null, or an empty list, without a head. A rate by position is the share of
    steps that accept this draft and all before it.
    """

    perplexity: float | None = Field(None, description="Perplexity per token")
    perplexity_interval: Interval | None = Field(None, description="Its 95 % interval")
    mtp_acceptance: float | None = Field(None, description="Draft acceptance rate of the first draft, after true text")
    mtp_acceptance_by_position: tuple[Number, ...] | None = Field(None, description="The same for each draft")
    greedy_acceptance_by_position: tuple[Number, ...] | None = Field(
        None, description="Draft acceptance rate of each draft while the model decodes greedily"
    )

    @property
    def has_unknown_acceptance(self) -> bool:
        """Whether the model was run, and its head could not be: in torch, heads of some layouts cannot."""
        return self.mtp_acceptance is None and "mtp_acceptance" in self.model_fields_set


class Behaviour(StoredDocument):
    """The behaviour of both models on the same text. Shares are of 1."""

    same_tokens: float | None = Field(None, description="Share of the text's tokens that both tokenizers agree on")
    perplexity_increase: float | None = Field(None, description="Perplexity divided by the base's, minus 1")
    top1_agreement: float | None = Field(None, description="Share of places at which both choose the same next token")
    most_repeated_token: float | None = Field(None, description="Share of the most frequent token in greedy text")
    long_context: float | None = Field(None, description="Share of a long text's places where all values are finite")
    mtp_acceptance_ratio: float | None = Field(None, description="Draft acceptance rate divided by the base's")
    speculative_agreement: float | None = Field(
        None, description="Share of tokens that speculative decoding leaves as they are without it"
    )
    base_most_repeated_token: float | None = Field(None, description="`most_repeated_token` of the base")
    base_long_context: float | None = Field(None, description="`long_context` of the base")
    base_speculative_agreement: float | None = Field(None, description="`speculative_agreement` of the base")
    tokens: int | None = Field(None, description="Number of tokens of the text")
    perplexity_increase_interval: Interval | None = Field(None, description="95 % interval of `perplexity_increase`")
    long_context_tokens: int | None = Field(None, description="Number of tokens of the long text")
    base: Side = Side()
    quantized: Side = Side()

    @property
    def was_run(self) -> bool:
        """Whether both models were run on the text."""
        return self.same_tokens is not None or self.top1_agreement is not None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that were set, with those of both sides beside the others."""
        own = self.model_dump(mode="json", exclude={"base", "quantized"})
        base = {f"base_{key}": value for key, value in self.base.to_json().items()}
        return {**own, **self.quantized.to_json(), **base}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Behaviour:
        """Read the part from a document of all values. Raises pydantic's ValidationError for a wrong value."""
        base = {key: document[f"base_{key}"] for key in Side.model_fields if f"base_{key}" in document}
        sides = {"base": Side.model_validate(base), "quantized": Side.model_validate(document)}
        return cls.model_validate({**document, **sides})


class TaskScore(StoredDocument):
    """The scores of both models in one lm-eval task."""

    metric: str = Field(description="lm-eval's name of the metric")
    base: Number = Field(description="The base's score")
    ours: Number = Field(description="The quantized model's score")
    recovery: float | None = Field(description="Share of the base's score that is left; null where the base scores 0")
    base_stderr: float | None = Field(None, description="Standard error of the base's score")
    stderr: float | None = Field(None, description="Standard error of the quantized model's score")
    samples: int | None = Field(None, description="Number of samples that both did")
    paired: Comparison | None = Field(None, description="The comparison sample by sample; absent if there is none")


class Evaluation(StoredDocument):
    """The scores of the lm-eval tasks that the recipe names."""

    tasks: dict[str, TaskScore] | None = Field(None, description="The scores by task; null where neither model was run")
    worst_task_recovery: float | None = Field(None, description="The smallest recovery; null if one of them is null")
    tasks_engine: str | None = Field(None, description="What ran the tasks: vLLM or transformers, with its version")


class Measured(StoredDocument):
    """Everything that validate measured of a quantized checkpoint and its base."""

    text: str | None = Field(None, exclude_if=is_none, description="The name of the text; absent without a store")
    texts: dict[str, str] | None = Field(
        None, exclude_if=is_none, description="The names of the texts by domain, if the recipe names one for each"
    )
    audit: Audit = Audit()
    head_kept: bool = Field(False, description="Whether the checkpoint must have the base's MTP head")
    vision: bool = Field(False, description="Whether the base has a vision tower")
    matrices: tuple[MatrixError, ...] | None = Field(None, description="The quantized matrices; null without one")
    divergence: Divergence = Divergence()
    behaviour: Behaviour = Behaviour()
    evaluation: Evaluation | None = Field(None, description="None if the recipe names no tasks")
    not_measured: str | None = Field(
        None, exclude_if=is_none, description="Why values are null; absent if all were measured"
    )
    not_computed: str | None = Field(
        None, exclude_if=is_none, description="What engines compute and validate does not; absent if there is nothing"
    )

    def with_noise_floor(self, floor: NoiseFloor) -> Measured:
        """Return a copy that has the noise floor of the base."""
        domains = {
            name: values.model_copy(update={"kl_noise_floor": floor.domains.get(name)})
            for name, values in (self.divergence.domains or {}).items()
        }
        changed = {"kl_noise_floor": floor.kl_divergence, "domains": domains or None}
        return self.model_copy(update={"divergence": self.divergence.model_copy(update=changed)})

    def to_json(self) -> dict[str, Any]:
        """Return all values as one flat object."""
        parts = {"audit", "divergence", "behaviour", "evaluation"}
        own = self.model_dump(mode="json", exclude=parts)
        evaluation = self.evaluation.to_json() if self.evaluation else {}
        values = {**own, **self.audit.to_json(), **self.divergence.to_json(), **self.behaviour.to_json(), **evaluation}
        return dict(sorted(values.items(), key=lambda item: KEYS.index(item[0])))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Measured:
        """Read what `to_json` returned, in this version or an earlier one. Missing keys get defaults.

        Raises ValueError (pydantic's ValidationError) for a value that does not fit.
        """
        parts: dict[str, StoredDocument] = {
            "audit": Audit.model_validate(document),
            "divergence": Divergence.model_validate(document),
            "behaviour": Behaviour.from_json(document),
        }
        if document.keys() & Evaluation.model_fields.keys():
            parts["evaluation"] = Evaluation.model_validate(document)
        return cls.model_validate({**document, **parts})


# The values that gates ask for are null, and all others absent, where a checkpoint could not be run or not be compared.
NOT_RUN = Behaviour(
    same_tokens=None,
    perplexity_increase=None,
    top1_agreement=None,
    most_repeated_token=None,
    long_context=None,
    mtp_acceptance_ratio=None,
    speculative_agreement=None,
)
NOT_COMPARED = Divergence(blocks=None, kl_divergence=None, vision_difference=None)
NOT_EVALUATED = Evaluation(tasks=None, worst_task_recovery=None)
