"""`requant bench`: measure how fast a checkpoint is in an engine, with its MTP head and without."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from requant.flows import api
from requant.flows.cli.command import CommandResult, command
from requant.tasks.errors import RecipeError

if TYPE_CHECKING:
    from requant.tasks.benchmark import MtpModes


@command("bench")
@click.argument("checkpoint")
@click.option(
    "--engine",
    metavar="ENGINE",
    help="Measure in this engine: vllm, torch, url:http://HOST:PORT, or auto, which is vllm if it is installed, "
    "otherwise torch.",
)
@click.option(
    "--mtp",
    type=click.Choice(["auto", "on", "off", "both"]),
    default="auto",
    show_default=True,
    help="Draft with the MTP head (on), without it (off), or measure both. auto: both if there is a head. Only for "
    "vllm.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take the engine, its flags and the prompts from this recipe.",
)
@click.option("--prompts", metavar="SETS", help="Use these prompt sets, separated by commas: card, code, prose, chat.")
@click.option("--concurrency", type=int, metavar="N", help="Measure with N requests at a time, besides one at a time.")
@click.option("--draft-tokens", type=int, metavar="N", help="Let the MTP head draft N tokens at a time.")
@click.option("--max-tokens", type=int, metavar="N", help="Generate at most N tokens for each prompt.")
@click.option(
    "--flag",
    "flags",
    multiple=True,
    metavar="NAME=VALUE",
    help="Pass this flag to the engine, spelled as the engine spells it. May be given several times.",
)
def bench(
    checkpoint: str, mtp: MtpModes, recipe: Path | None, prompts: str | None, flags: tuple[str, ...], **asked: Any
) -> CommandResult:
    """Measure a checkpoint's speed and draft acceptance in an engine.

    CHECKPOINT is a folder, or repo_id[@revision], which is downloaded into the store. The engine vllm starts
    `vllm serve`, or the command in REQUANT_VLLM, and stops it afterwards; url: sends the requests to a server that is
    running already. Options that are not given take their values from --recipe, otherwise from the defaults of a
    recipe.

    \b
    Examples:
      requant bench build/demo/checkpoint --engine vllm --mtp both
      requant bench build/result --prompts card,code --flag max-model-len=8192
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
    folder = api.local_checkpoint(checkpoint)
    name = Path(checkpoint).resolve().name
    logs = cache_folder() / "bench" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    remote_code = loaded is not None and loaded.allow_remote_code
    measured = benchmark.bench(folder, settings, logs, mtp=mtp, remote_code=remote_code)
    result = measured.with_logs(str(path) for path in sorted(logs.glob("*.log")))
    return CommandResult(result.to_json(), bench_text(result, name))


def _flag(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, whose value is YAML. A name alone stands for true. Raises RecipeError."""
    import yaml

    from requant.tasks.recipe.recipe import NOT_YAML

    name, equals, value = text.removeprefix("--").partition("=")
    try:
        return name, yaml.safe_load(value) if equals else True
    except NOT_YAML as error:
        raise RecipeError(f"--flag {name}: the value {value!r} is not YAML") from error
