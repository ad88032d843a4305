"""Common parts of the commands of `requant`: --json, progress on stderr, and options that several commands have."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from requant.flows.cli.colours import use_colour, with_colours
from requant.flows.recipes import RECIPES_FOLDERS, default_recipes
from requant.tasks.errors import redact
from requant.tasks.pipeline.log import set_verbosity
from requant.tasks.progress import show


class OrderedGroup(click.Group):
    """A group whose help lists the commands in the order in which they were added, instead of alphabetically."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class CommandResult(NamedTuple):
    """What a command returns: its JSON document, the text for a terminal, and the exit status."""

    document: Mapping[str, Any]
    text: str
    status: int = 0


class _NewPath(click.Path):
    """A path to write to. Missing folders are created later, so none of its parents may be a file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        existing = next(folder for folder in path.absolute().parents if folder.exists())
        if not existing.is_dir():
            self.fail(f"{existing} is a file, and no folder to write into", param, ctx)
        return path


NEW_FOLDER = _NewPath(path_type=Path, file_okay=False)
NEW_FILE = _NewPath(path_type=Path, dir_okay=False)
EXISTING_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
FORCE = click.option(
    "--force",
    is_flag=True,
    help="Write into the folder even if it holds files that Requant did not write there, or that were changed since. "
    "Files of the same names are replaced, the others stay.",
)
RECIPES = click.option(
    "--recipes",
    type=click.Path(path_type=Path),
    default=default_recipes,
    metavar="FOLDER",
    show_default=f"{RECIPES_FOLDERS[0]}, or {RECIPES_FOLDERS[1]} if there is none",
    help="Take the recipes of this folder, one YAML file per recipe.",
)


def _set_verbosity(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and parameter.name == "quiet":
        set_verbosity("quiet")
        show("nothing")
    elif asked:
        set_verbosity("verbose")


QUIET = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_set_verbosity,
    help="Print the result, warnings and errors only.",
)  # fmt: skip
VERBOSE = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_set_verbosity,
    help="Print what Prefect logs too, and more of Requant.",
)  # fmt: skip
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, as in quantize.iters=50. May be given several times.",
)
SCHEME = click.option("--scheme", metavar="SCHEME", help="Short for --set quantize.scheme=SCHEME, as in W4A16.")
PUBLISH = click.option("--publish", metavar="REPO", help="Short for --set publish.repo_id=REPO.")
F = TypeVar("F", bound=Callable[..., CommandResult])


def command(name: str) -> Callable[[F], click.Command]:
    """Return the decorator that makes a command of a function, and adds --json to it."""

    def wrap(function: F) -> click.Command:
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> None:
            result = function(**arguments)
            if as_json:
                click.echo(redact(json.dumps(result.document, indent=1)))
            else:
                colour = use_colour(sys.stdout)
                text = redact(_visible(result.text))
                click.echo(with_colours(text) if colour else text, color=colour)
            sys.exit(result.status)

        option = click.option("--json", "as_json", is_flag=True, help="Print only a JSON document to stdout.")
        return click.command(name)(option(QUIET(VERBOSE(run))))

    return wrap


def all_overrides(overrides: Sequence[str], scheme: str | None, publish: str | None) -> tuple[str, ...]:
    """Return the overrides of a recipe, with those that --scheme and --publish stand for."""
    short = {"quantize.scheme": scheme, "publish.repo_id": publish}
    return (*overrides, *(f"{key}={json.dumps(value)}" for key, value in short.items() if value is not None))


def progress(text: str) -> None:
    """Print a line to stderr."""
    click.echo(redact(_visible(text)), err=True)


def warn_of_foreign_weights(folder: Path, weights: Sequence[str]) -> None:
    """Warn of weight files in a checkout that are not the artifact's."""
    for path in weights:
        progress(f"{folder / path} is no part of the artifact, and a loader may read it: delete it if it is not needed")


def _visible(text: str) -> str:
    """Escape control characters, with which a name from outside could move the cursor or hide text."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
