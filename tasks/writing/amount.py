"""How much calibration text a base writes for a recipe."""

from __future__ import annotations

from requant.tasks.quantizing.samples import divide
from requant.tasks.recipe.quantize_section import SELF, Quantize
from requant.tasks.recipe.recipe import Recipe

# How much more is written than the samples hold, since whole conversations rarely fill a sample to its last token.
MARGIN = 1.25


def writes_text(recipe: Recipe) -> bool:
    """Check whether a recipe is calibrated with text that the base writes."""
    return any(source.source == SELF for source in recipe.quantize.sources)


def needed_tokens(recipe: Recipe) -> int:
    """Return how many tokens the base writes: for the output whose samples hold most, and MARGIN."""
    return int(MARGIN * max(own_samples(output) * output.seqlen for output in outputs_of(recipe)))


def max_row_tokens(recipe: Recipe) -> int:
    """Return how many tokens a row has at most: those of the longest sample."""
    return max(output.seqlen for output in outputs_of(recipe))


def outputs_of(recipe: Recipe) -> list[Quantize]:
    """Return how each output of a recipe is quantized."""
    return [one.quantize for one in recipe.each.values()]


def own_samples(quantize: Quantize) -> int:
    """Return how many samples are to come from the base's own text: its share by weight, or without weights all.

    Sources without weights fill up for each other.
    """
    weights = [source.weight for source in quantize.sources]
    if not any(weights):
        return quantize.nsamples
    number = next(number for number, source in enumerate(quantize.sources) if source.source == SELF)
    return max(1, divide(quantize.nsamples, weights)[number])
