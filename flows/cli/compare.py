"""`requant compare`: find the better one of two checkpoints of one base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from requant.flows import api
from requant.flows.cli.command import NEW_FILE, CommandResult, command, progress

if TYPE_CHECKING:
    from requant.tasks.validating.comparison import ComparisonDocument

PICTURE_SUFFIXES = (".png", ".svg")


@command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--base", required=True, metavar="CHECKPOINT", help="The base of both: a folder, or repo_id[@revision].")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take the text, its tokens and allow_remote_code from this recipe.",
)
@click.option("--picture", type=NEW_FILE, metavar="FILE", help="Draw the comparison into this .png or .svg file.")
def compare(a: str, b: str, base: str, recipe: Path | None, picture: Path | None) -> CommandResult:
    """Say which of two checkpoints is closer to their base.

    A and B are folders, or repo_id[@revision], which is downloaded into the store. Both are measured on the same
    text: the KL divergence from the base and the draft acceptance rate in each domain. A difference counts only if
    other text of this kind, or another seed of the same recipe, would hardly explain it.

    \b
    Examples:
      requant compare build/w4 build/w3 --base Qwen/Qwen3.6-27B
      requant compare me/int4@v1 me/int4 --base build/base --picture new.png
    """
    if picture is not None and picture.suffix not in PICTURE_SUFFIXES:
        raise click.UsageError(f"--picture {picture}: name a file that ends in {' or '.join(PICTURE_SUFFIXES)}")
    document = api.compare(a, b, base=base, recipe=recipe)
    if picture is not None:
        _draw(document, picture)
    from requant.flows.report.comparison import comparison_text

    return CommandResult(document.to_json(), comparison_text(document))


def _draw(document: ComparisonDocument, path: Path) -> None:
    """Draw the comparison into a file. If it cannot be drawn, the table still has the numbers.

    Raises OSError for a file that cannot be written.
    """
    from requant.tasks.checkpoint.writer import write_file
    from requant.tasks.plots import comparison as pictures

    try:
        drawn = pictures.comparison(document)
    except Exception as error:
        progress(f"no picture: {type(error).__name__}: {error}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path.parent, path.name, [drawn.png if path.suffix == ".png" else drawn.svg])
