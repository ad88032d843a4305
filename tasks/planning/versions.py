"""Installed tools of another version than a stage of the run needs, found before the run begins."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from tasks import benchmark, evaluate, quantize, validate
from tasks.recipe import Recipe
from tasks.stage import Stage
from tasks.tools import version_problem


def version_problems(recipe: Recipe, to_run: Collection[str]) -> Iterator[str]:
    """Say what would end these stages on this machine, as `run_stage` says it; each tool once, at its first stage."""
    told = set[str]()
    for stage, tools in _used(recipe, to_run):
        declared = {name: version for name, version in stage.locked.items() if name in tools and name not in told}
        told |= declared.keys()
        if problem := version_problem(stage.name, declared):
            yield problem


def _used(recipe: Recipe, to_run: Collection[str]) -> Iterator[tuple[Stage, tuple[str, ...]]]:
    """The stages that have tools, in the order of a run, and which of these tools are used."""
    if "quantize" in to_run:
        yield quantize.STAGE, quantize.STAGE.tools
    if "validate" in to_run:
        yield validate.STAGE, validate.STAGE.tools
        if recipe.eval is not None:  # Tasks are evaluated inside validate.
            yield evaluate.STAGE, evaluate.STAGE.tools
    if "benchmark" in to_run:
        yield benchmark.STAGE, benchmark.used_tools(recipe.benchmark)
