"""Group sizes and the inputs that they must divide: no engine loads a matrix whose last group is smaller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat.auto_round import GROUP_SIZES
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.planning.layers import LayerSelection, choose_layers
from requant.tasks.recipe.recipe import Recipe


def settled(source: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe of one result with a number for a group size of auto: the largest that divides the inputs of all
    packed layers, but for those that `layers` gives one of their own. Told from the base's headers.

    Raises CheckpointError where the base cannot be laid out.
    """
    if recipe.quantize.group_size != "auto":
        return recipe
    base = dequantize_fp8(split_fused_experts(source))
    choice = choose_layers(base, recipe.quantize.with_group_size(GROUP_SIZES[0]))
    return recipe.with_group_size(next(iter(dividing(_inputs(base, choice).values())), GROUP_SIZES[0]))


def dividing(inputs: Iterable[int]) -> list[int]:
    """The group sizes that engines load and that divide all of these, the largest first."""
    widths = set(inputs)
    return [size for size in GROUP_SIZES if not any(width % size for width in widths)]


def uneven_problems(base: Checkpoint, choice: LayerSelection, group_sizes: Mapping[str, int]) -> list[str]:
    """What is wrong with the group sizes of the packed modules, by module: a sentence for the recipe's own, and one for
    those of its `layers`."""
    problems = []
    shared = _inputs(base, choice)
    own = {name: base.tensors[f"{name}.weight"].shape[1] for name in choice.packed if name in choice.own_group}
    for inputs, setting in ((shared, "quantize.group_size {size}"), (own, "quantize.layers: group_size {size}")):
        odd = {name: width for name, width in inputs.items() if group_sizes[name] > 0 and width % group_sizes[name]}
        if not odd:
            continue
        module, width = next(iter(odd.items()))
        sizes = dividing(inputs.values() if inputs is shared else [width])
        others = [*map(str, sizes), "-1 (whole rows)", *(["auto"] if inputs is shared else [])]
        more = f" (and of {len(odd) - 1} more)" if len(odd) > 1 else ""
        problems.append(
            f"{setting.format(size=group_sizes[module])} does not divide the {width} inputs of {module}{more}, and no "
            f"engine loads a last group that is smaller: use {', '.join(others[:-1])} or {others[-1]}"
        )
    return problems


def _inputs(base: Checkpoint, choice: LayerSelection) -> dict[str, int]:
    """The inputs of the packed modules that have the recipe's group size."""
    modules = (name for name in choice.packed if name not in choice.own_group)
    return {name: base.tensors[f"{name}.weight"].shape[1] for name in modules}
