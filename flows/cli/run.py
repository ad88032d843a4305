"""`requant run`: run the pipeline of a recipe in this process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from requant.flows.checkout import check_folder, copy_to_folder, refuse_sources
from requant.flows.cli.command import (
    FORCE,
    NEW_FILE,
    NEW_FOLDER,
    PUBLISH,
    SCHEME,
    SET,
    CommandResult,
    all_overrides,
    command,
    warn_of_foreign_weights,
)
from requant.flows.cli.report_files import check_report, write_report
from requant.tasks.artifact import PICTURES, RELEASE_FILES
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.errors import RequantError
from requant.tasks.plots import NAMES
from requant.tasks.store import open_store

log = logging.getLogger(__name__)
if TYPE_CHECKING:
    from requant.flows.report.report import RunReport


def _report_path(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix == ".md":
        raise click.BadParameter(f"{path} is where the markdown goes: name the JSON document, {path.stem}.json")
    return path


@command("run")
@click.argument("recipe")
@SET
@SCHEME
@PUBLISH
@click.option(
    "--checkout",
    type=NEW_FOLDER,
    metavar="FOLDER",
    help="Write the result's files into this folder, which may be new, empty or an earlier checkout. Each of several "
    "outputs gets a folder of its name in it.",
)
@FORCE
@click.option(
    "--report",
    "report_path",
    type=NEW_FILE,
    metavar="FILE",
    callback=_report_path,
    help="Write the JSON document to this file, and beside it a report in Markdown and a folder of pictures.",
)
def run(
    recipe: str,
    overrides: tuple[str, ...],
    scheme: str | None,
    publish: str | None,
    checkout: Path | None,
    force: bool,
    report_path: Path | None,
) -> CommandResult:
    """Run the whole pipeline of a recipe, here and now.

    RECIPE is a YAML file, or owner/name[@revision] or the folder of a base, which stands for a recipe with this base
    and defaults.
    The stages are download, quantize, mtp_fix, validate, benchmark and publish; one that is in the store already is
    not done again. No Prefect server is needed; the one that PREFECT_API_URL names is used.
    Exit status 1: a gate failed or the work failed.

    \b
    Examples:
      requant run deployments/recipes/demo.yaml --checkout build/result
      requant run recipe.yaml --set quantize.iters=50 --report build/report.json
      requant run ./my-finetune --scheme W4A16 --publish me/my-finetune-W4A16
    """
    from requant.tasks.evaluating.definitions import check_tasks, has_lm_eval
    from requant.tasks.recipe.loader import load_recipe

    loaded = load_recipe(recipe, all_overrides(overrides, scheme, publish))
    log.info(f"starting the run of {recipe}: loading its libraries")
    store = open_store()  # Raises RecipeError for a wrong REQUANT_STORE, before anything starts.
    if has_lm_eval():  # A task that does not exist is a wrong recipe. What else stops the run, it says all at once.
        check_tasks(loaded.eval)
    if force and checkout is None:
        raise click.UsageError("--force is about the folder of --checkout: name one")
    if checkout is not None:
        refuse_sources(checkout, (source.folder for source in (loaded.base, loaded.adapter) if source is not None))
        for name in loaded.each:
            check_folder(store, checkout / name, force=force)
    if report_path is not None:
        check_report(report_path)
    from requant.flows.embedded import embedded_prefect

    with embedded_prefect():
        from requant.flows.report.terminal import render
        from requant.flows.requantize import RunFailed, requantize

        outcome: Any = requantize(loaded, return_state=True).result(raise_on_failure=False)
        if isinstance(outcome, BaseException) and not isinstance(outcome, RunFailed):
            raise outcome
        report: RunReport = outcome.report if isinstance(outcome, RunFailed) else outcome
    try:
        for name, one in report.each.items():
            lay_out_result(one, checkout / name if checkout else None, force=force)
    finally:  # The report is written even if somebody has put files into the folder in the meantime.
        if report_path is not None:
            _write_report(report, report_path)
    document = report.document().to_json()
    return CommandResult(document, render(report), 0 if report.status in {"published", "validated"} else 1)


def _write_report(report: RunReport, path: Path) -> None:
    try:
        write_report(report, path)
    except OSError as error:  # It could be written when the run began.
        raise RequantError(
            f"the run ended as {report.status}, and its report {path} cannot be written ({error.strerror}): name "
            "another place and run again, which reuses every finished stage"
        ) from error


def lay_out_result(report: RunReport, checkout: Path | None, *, force: bool) -> None:
    """Write the result into the user's folder; without one, link its files in a folder of a local store."""
    store = open_store()
    if report.artifact is None or not (checkout or store.is_local):
        return
    if checkout is not None:
        report.path, foreign = copy_to_folder(store, report.artifact, checkout, report.beside, force=force)
        warn_of_foreign_weights(report.path, foreign)
        return
    report.path = store.link_files(report.artifact, store.checkout_folder(report.artifact))
    release_paths = {*RELEASE_FILES, *(f"{PICTURES}/{name}.png" for name in NAMES)}
    for path in release_paths - set(report.beside):
        if path not in report.artifact:  # A file of an earlier run, since the folder is the store's own.
            (report.path / path).unlink(missing_ok=True)
    for path, data in report.beside.items():
        write_file(report.path, path, [data])
