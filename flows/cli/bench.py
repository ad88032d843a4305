"""`requant bench`: how fast a checkpoint is in an engine, with its MTP head and without."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from requant.flows.cli.command import FOLDER, command
from requant.tasks.errors import RecipeError


@command("bench")
@click.argument("folder", type=FOLDER)
@click.option("--engine", help="auto, vllm, url:http://... or torch. auto is vllm where there is one, else torch.")
@click.option(
    "--mtp",
    type=click.Choice(["auto", "on", "off", "both"]),
    default="auto",
    show_default=True,
    help="Draft with the head. auto: both if there is one. For vllm only.",
)
@click.option("--recipe", type=click.Path(path_type=Path), help="Take engine, flags and prompts from this recipe.")
@click.option("--prompts", help="Prompt sets, with commas between them: card, code, prose, chat.")
@click.option("--concurrency", type=int, help="Requests at once, beside one at a time.")
@click.option("--draft-tokens", type=int, help="Tokens that the head drafts at once.")
@click.option("--max-tokens", type=int, help="At most so many tokens a prompt.")
@click.option("--flag", "flags", multiple=True, metavar="NAME=VALUE", help="A flag of the engine, as it spells it.")
def bench(
    folder: Path, mtp: str, recipe: Path | None, prompts: str | None, flags: tuple[str, ...], **asked: Any
) -> tuple[dict[str, Any], str, int]:
    """Measure a checkpoint's speed and draft acceptance in an inference engine.

    vllm starts `vllm serve`, or the command in REQUANT_VLLM, and ends it. url: asks a server that runs already.
    """
    from requant.flows.report.terminal import bench_text
    from requant.tasks import benchmark
    from requant.tasks.recipe.loader import load_recipe, parse_recipe
    from requant.tasks.recipe.recipe import Benchmark
    from requant.tasks.store import cache_folder

    loaded = load_recipe(recipe) if recipe else None
    settings = loaded.benchmark if loaded else Benchmark()
    changes = {name: value for name, value in asked.items() if value is not None}
    if prompts is not None:
        changes["prompts"] = [name.strip() for name in prompts.split(",")]
    changes["flags"] = {**settings.flags, **dict(_flag(text) for text in flags)}
    benchmark_part = {**settings.model_dump(), **changes}
    settings = parse_recipe({"base": {"repo_id": "any/base"}, "benchmark": benchmark_part}).benchmark
    logs = cache_folder() / "bench" / f"{folder.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    values = benchmark.bench(
        folder,
        settings,
        logs,
        mtp=mtp,
        remote_code=loaded is not None and loaded.allow_remote_code,
    )
    document = {**values, "logs": [str(path) for path in sorted(logs.glob("*.log"))]}
    return document, bench_text(document, folder.resolve().name), 0


def _flag(text: str) -> tuple[str, Any]:
    import yaml

    from requant.tasks.recipe.recipe import NOT_YAML

    name, equals, value = text.removeprefix("--").partition("=")
    try:
        return name, yaml.safe_load(value) if equals else True
    except NOT_YAML as error:
        raise RecipeError(f"--flag {name}: the value {value!r} is not YAML") from error
