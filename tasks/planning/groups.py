"""Group sizes must divide the inputs of the layers: no engine loads a matrix whose last group is smaller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat.auto_round import GROUP_SIZES
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.planning.layers import LayerSelection, choose_layers
from requant.tasks.recipe.recipe import Recipe


def resolve_group_size(source: Checkpoint, recipe: Recipe) -> Recipe:
    """Replace a group size of auto in the recipe of one result by a number, from the base's headers.

    It is the largest group size that divides the inputs of all quantized layers, except those with a group size of
    their own in `layers`. Raises CheckpointError if the base cannot be laid out.
    """
    if recipe.quantize.group_size != "auto":
        return recipe
    base = dequantize_fp8(split_fused_experts(source))
    choice = choose_layers(base, recipe.quantize.with_group_size(GROUP_SIZES[0]))
    return recipe.with_group_size(next(iter(dividing_group_sizes(_inputs(base, choice).values())), GROUP_SIZES[0]))


def dividing_group_sizes(inputs: Iterable[int]) -> list[int]:
    """Return the group sizes that engines load and that divide all of these, the largest first."""
    widths = set(inputs)
    return [size for size in GROUP_SIZES if not any(width % size for width in widths)]


def uneven_problems(base: Checkpoint, choice: LayerSelection, group_sizes: Mapping[str, int]) -> list[str]:
    """Say which group sizes do not divide the inputs of their modules.

    `group_sizes` has the group size of each quantized module. There is one sentence for the recipe's group size, and
    one for those in its `layers`.
    """
    problems = []
    shared = _inputs(base, choice)
    own = {name: base.tensors[f"{name}.weight"].shape[1] for name in choice.quantized if name in choice.own_group}
    for inputs, setting in ((shared, "quantize.group_size {size}"), (own, "quantize.layers: group_size {size}")):
        odd = {name: width for name, width in inputs.items() if group_sizes[name] > 0 and width % group_sizes[name]}
        if not odd:
            continue
        module, width = next(iter(odd.items()))
        sizes = dividing_group_sizes(inputs.values() if inputs is shared else [width])
        others = [*map(str, sizes), "-1 (whole rows)", *(["auto"] if inputs is shared else [])]
        more = f" (and of {len(odd) - 1} more)" if len(odd) > 1 else ""
        problems.append(
            f"{setting.format(size=group_sizes[module])} does not divide the {width} inputs of {module}{more}, and no "
            f"engine loads a last group that is smaller: use {', '.join(others[:-1])} or {others[-1]}"
        )
    return problems


def _inputs(base: Checkpoint, choice: LayerSelection) -> dict[str, int]:
    """Return the inputs of the quantized modules that have the recipe's group size, by module."""
    modules = (name for name in choice.quantized if name not in choice.own_group)
    return {name: base.tensors[f"{name}.weight"].shape[1] for name in modules}
