"""Comparison of a quantized checkpoint with its base: behaviour, distributions, decoder blocks, vision features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.progress import progress
from requant.tasks.validating.blocks import Rows
from requant.tasks.validating.domains import compare_domains
from requant.tasks.validating.gates import most_repeated
from requant.tasks.validating.loaded import model_of
from requant.tasks.validating.measured import Behaviour, BlockError, Divergence, Side
from requant.tasks.validating.measurement import Floats, Measurement, perplexity_increase
from requant.tasks.validating.model import RunSettings, Skeleton, few_threads


def side_by_side(of_base: Measurement, of_quantized: Measurement) -> Behaviour:
    """Compare the measurements of both checkpoints on one text."""
    same_shape = of_base.tokens.shape == of_quantized.tokens.shape
    increase, increase_interval = perplexity_increase(of_quantized, of_base) if same_shape else (None, None)
    # With NaN losses the drafts always agree, so no rate is reported.
    finite = bool(np.isfinite(of_quantized.nll).all())
    quantized = _side(of_quantized, with_rates=finite)
    rate = quantized.mtp_acceptance
    return Behaviour(
        same_tokens=float((of_base.tokens == of_quantized.tokens).mean()) if same_shape else 0.0,
        tokens=int(of_base.tokens.size),
        perplexity_increase=increase,
        perplexity_increase_interval=increase_interval,
        top1_agreement=float((of_base.top1 == of_quantized.top1).mean()) if same_shape else 0.0,
        most_repeated_token=_most_repeated_token(of_quantized),
        base_most_repeated_token=_most_repeated_token(of_base),
        long_context=_finite_share(of_quantized),
        base_long_context=_finite_share(of_base),
        long_context_tokens=int(of_quantized.context[0]),
        # A ratio to a rate of 0 is undefined.
        mtp_acceptance_ratio=rate / of_base.acceptance if rate is not None and of_base.acceptance else None,
        speculative_agreement=_speculative_agreement(of_quantized) if finite else None,
        base_speculative_agreement=_speculative_agreement(of_base),
        base=_side(of_base),
        quantized=quantized,
    )


def _most_repeated_token(measurement: Measurement) -> float:
    """Return the share of the most frequent token of a greedy continuation, the mean of all continuations."""
    return sum(map(most_repeated, measurement.generated.tolist())) / len(measurement.generated)


def _finite_share(measurement: Measurement) -> float:
    """Return the share of the long text's places at which all values are finite."""
    tried, finite_places = measurement.context.tolist()
    return float(finite_places / tried)


def _speculative_agreement(measurement: Measurement) -> float | None:
    return float(measurement.speculative.mean()) if measurement.speculative.size else None


def _side(measurement: Measurement, with_rates: bool = True) -> Side:
    """Return the values of one model, without draft acceptance rates if these mean nothing."""
    return Side(
        perplexity=measurement.perplexity,
        perplexity_interval=measurement.perplexity_interval,
        mtp_acceptance=measurement.acceptance if with_rates else None,
        mtp_acceptance_by_position=tuple(measurement.acceptance_by_position) if with_rates else (),
        greedy_acceptance_by_position=tuple(measurement.greedy_acceptance_by_position) if with_rates else (),
    )


@torch.inference_mode()
def compare(
    quantized_folder: Path,
    base_folder: Path,
    of_quantized: Measurement,
    of_base: Measurement,
    settings: RunSettings,
) -> Divergence:
    """Compare next-token distributions, decoder blocks and vision features.

    Both measurements are of the same tokens. The quantized blocks are run on the base's hidden states, one block in
    memory at a time.
    """
    with _loaded_ends(quantized_folder, base_folder, settings) as (skeleton, base):
        blocks = _block_errors(skeleton, of_quantized, of_base)
        divergence = kl_divergence(skeleton, base, of_quantized, of_base)
    return Divergence(
        blocks=tuple(blocks),
        kl_divergence=float(divergence.mean()),
        kl_divergence_p99=float(np.quantile(divergence, 0.99)),
        vision_difference=feature_difference(of_quantized.features, of_base.features),
        domains=compare_domains(of_quantized, of_base, divergence),
    )


@torch.inference_mode()
def kl_by_place(
    quantized_folder: Path,
    base_folder: Path,
    of_quantized: Measurement,
    of_base: Measurement,
    settings: RunSettings,
) -> Floats:
    """Return KL(base || quantized) of every next-token distribution, in nats: float32 `[n, L-1]`.

    Both measurements are of the same tokens.
    """
    with _loaded_ends(quantized_folder, base_folder, settings) as (skeleton, base):
        return kl_divergence(skeleton, base, of_quantized, of_base)


@contextlib.contextmanager
def _loaded_ends(
    quantized_folder: Path, base_folder: Path, settings: RunSettings
) -> Iterator[tuple[Skeleton, Skeleton]]:
    """Load embeddings and output layers of both; the same ones twice if they are equal."""
    with model_of(Checkpoint.open(quantized_folder), settings) as skeleton, few_threads(skeleton.nbytes):
        skeleton.load_ends()
        base_checkpoint = Checkpoint.open(base_folder)
        base = skeleton
        if not _same_output_layer(skeleton.checkpoint, base_checkpoint):
            base = Skeleton(base_checkpoint, settings)
            base.load_ends()
        try:
            yield skeleton, base
        finally:
            if base is not skeleton:
                base.drop()


def _block_errors(skeleton: Skeleton, of_quantized: Measurement, of_base: Measurement) -> list[BlockError]:
    tokens = torch.from_numpy(of_base.tokens[:1, : of_base.probes.shape[1]]).long()
    rows = Rows.of(skeleton, tokens)
    kinds = getattr(skeleton.text.config, "layer_types", None) or ["decoder"] * len(skeleton.blocks)
    errors = []
    with progress("compare", len(skeleton.blocks), "blocks") as bar:
        for number, block in enumerate(skeleton.in_turn()):
            base_input, base_output = (of_base.probes[number + k].to(skeleton.device) for k in (0, 1))
            rows.hidden = [base_input[None]]
            rows.through(number, block)
            error = _relative(rows.hidden[0][0] - base_output, base_output - base_input)
            reached = of_base.probes[number + 1]
            drift = _relative(of_quantized.probes[number + 1] - reached, reached)
            errors.append(BlockError(block=number, kind=kinds[number], error=error, drift=drift))
            bar.advance()
    return errors


def kl_divergence(skeleton: Skeleton, base: Skeleton, of_quantized: Measurement, of_base: Measurement) -> Floats:
    """Return KL(base || quantized) of every next-token distribution, in nats: float32 `[n, L-1]`."""
    divergence = []
    for quantized_hidden, base_hidden in zip(of_quantized.hidden, of_base.hidden, strict=True):
        quantized_log = skeleton.logits(quantized_hidden[:-1].to(skeleton.device)).log_softmax(-1)
        base_log = base.logits(base_hidden[:-1].to(base.device)).log_softmax(-1)
        divergence.append((base_log.exp() * (base_log - quantized_log)).sum(-1).cpu().numpy())
    return np.stack(divergence)


def feature_difference(quantized: torch.Tensor, base: torch.Tensor) -> float | None:
    """Return the largest difference of two features; None if the base has none.

    It is infinity for another shape, and where one alone is NaN. What is NaN or infinite in both is the same.
    """
    if not base.numel():
        return None
    if quantized.shape != base.shape:
        return float("inf")
    same = (quantized == base) | (quantized.isnan() & base.isnan())
    difference = (quantized.float() - base.float()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(difference.masked_fill(same, 0.0).max())


def _same_output_layer(quantized: Checkpoint, base: Checkpoint) -> bool:
    """Check whether both have the same embeddings and output layer, byte for byte.

    The final norm does not matter: the measured hidden states have passed through it.
    """
    tensors, base_tensors = _embeddings(quantized), _embeddings(base)
    return tensors.keys() == base_tensors.keys() and all(
        tensors[name].nbytes == tensor.nbytes
        and all(a == b for a, b in zip(tensors[name].chunks(), tensor.chunks(), strict=True))
        for name, tensor in base_tensors.items()
    )


def _embeddings(checkpoint: Checkpoint) -> dict[str, Tensor]:
    names = ("embed_tokens.weight", "lm_head")
    return {name: t for name, t in checkpoint.tensors.items() if any(part in name for part in names)}


def _relative(difference: torch.Tensor, size: torch.Tensor) -> float:
    size_norm = float(size.float().norm())
    difference_norm = float(difference.float().norm())
    return difference_norm / size_norm if size_norm else float(difference_norm > 0)
