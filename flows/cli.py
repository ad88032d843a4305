"""The command line: `requant COMMAND ... [--json]`.

With --json, stdout is one JSON document and nothing else. Exit status: 0 done, 1 a gate failed or the work failed,
2 wrong usage or recipe, 130 interrupted. Heavy imports happen inside the commands that need them.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from flows.bench_command import bench
from flows.checkpoint_commands import inspect, mtp_fix, validate
from flows.command import FORCE, NEW_FILE, NEW_FOLDER, command, tell_foreign
from flows.deploy_command import deploy
from flows.plan_command import plan
from flows.release_commands import publish, verify
from flows.store_commands import store
from flows.watch_command import watch
from flows.worker_command import worker
from tasks.artifact import OURS
from tasks.checkout import check_folder, check_writable, lay_out
from tasks.checkpoint.writer import write_file, write_json
from tasks.environment import bypass_proxy_on_loopback
from tasks.errors import FolderInUse, RecipeError, RequantError, explain_os_error, redact
from tasks.log import Plain
from tasks.pictures import FOLDER, NAMES, write_pictures
from tasks.store import open_store

if TYPE_CHECKING:
    from flows.report import Report


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="requant")
def cli() -> None:
    """Quantize a Hugging Face base model, prove that the result works, publish it."""


def _report_path(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix == ".md":
        raise click.BadParameter(f"{path} is where the markdown goes: name the JSON document, {path.stem}.json")
    return path


@command("run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as in quantize.iters=50.")
@click.option(
    "--checkout",
    type=NEW_FOLDER,
    help="Lay the result's files into this folder; of outputs, each into one of its name. It may be new, empty, or an "
    "earlier checkout.",
)
@FORCE
@click.option(
    "--report",
    "report_path",
    type=NEW_FILE,
    callback=_report_path,
    help="Write the JSON document here; beside it, by the same name, a report in markdown and a folder of pictures.",
)
def run(
    recipe: Path, overrides: tuple[str, ...], checkout: Path | None, force: bool, report_path: Path | None
) -> tuple[dict[str, Any], str, int]:
    """Run the whole pipeline, here and now."""
    from tasks.evaluate import check_tasks
    from tasks.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides)
    store = open_store()  # a wrong REQUANT_STORE is a wrong usage, found before anything starts
    check_tasks(loaded.eval)
    if force and checkout is None:
        raise click.UsageError("--force is about the folder of --checkout: name one")
    if checkout is not None:
        for name in loaded.each:
            check_folder(store, checkout / name, force=force)
    if report_path is not None:
        check_report(report_path)
    from flows.embedded import embedded_prefect

    with embedded_prefect():
        from flows.requantize import RunFailed, requantize
        from flows.terminal import render

        outcome: Any = requantize(loaded, return_state=True).result(raise_on_failure=False)
        if isinstance(outcome, BaseException) and not isinstance(outcome, RunFailed):
            raise outcome
        report: Report = outcome.report if isinstance(outcome, RunFailed) else outcome
    try:
        for name, one in report.each.items():
            _lay_out(one, checkout / name if checkout else None, force=force)
    finally:  # a folder that was filled in the meantime costs nobody the report
        if report_path is not None:
            _keep_report(report, report_path)
    return report.to_json(), render(report), 0 if report.status in {"published", "validated"} else 1


def _keep_report(report: Report, path: Path) -> None:
    try:
        write_report(report, path)
    except OSError as error:  # the place could be written to when the run began
        raise RequantError(
            f"the run ended as {report.status}, and its report {path} cannot be written ({error.strerror}): name "
            "another place and run again, which reuses every finished stage"
        ) from error


def write_report(report: Report, path: Path) -> None:
    """Write the JSON document as `path`, and beside it STEM.md and the folder STEM-pictures (of outputs, one in it for
    each)."""
    from flows.markdown import comparison, markdown

    write_json(path.parent, path.name, report.to_json())
    parts = [comparison(report)] if report.recipe.outputs else []
    for name, one in report.each.items():
        folder = path.with_name(f"{path.stem}-pictures") / name
        if one.pictures or folder.is_dir():
            write_pictures(folder, one.pictures)
        where = quote(folder.relative_to(path.parent).as_posix())
        parts.append(markdown(one, functools.partial("{0}/{1.name}.svg".format, where)))
    write_file(path.parent, f"{path.stem}.md", ["\n".join(parts).encode()])


def check_report(path: Path) -> None:
    """Raises FolderInUse unless a report can be written to `path` and beside it, while nothing is done yet."""
    check_writable(path.parent.resolve(), path)
    pictures = path.with_name(f"{path.stem}-pictures")
    if pictures.exists() and not pictures.is_dir():
        raise FolderInUse(f"{pictures} is a file, and the report's pictures go into a folder of this name: move it")
    if (text := path.with_name(f"{path.stem}.md")).is_dir():
        raise FolderInUse(f"{text} is a folder, and the report in markdown gets this name: move it")


def _lay_out(report: Report, checkout: Path | None, *, force: bool) -> None:
    """Give the result a path: a checkout of the user's own, or read-only links beside a local store."""
    store = open_store()
    if report.artifact is None or not (checkout or store.is_local):
        return
    if checkout is not None:
        report.path, foreign = lay_out(store, report.artifact, checkout, report.beside, force=force)
        tell_foreign(report.path, foreign)
        return
    report.path = store.hand_out(report.artifact, store.checkout_folder(report.artifact))
    ours = {*OURS, *(f"{FOLDER}/{name}.png" for name in NAMES)}
    for path in ours - set(report.beside):
        if path not in report.artifact:  # An earlier run laid it into this folder, which is the store's own.
            (report.path / path).unlink(missing_ok=True)
    for path, data in report.beside.items():
        write_file(report.path, path, [data])


for each in (run, plan, validate, mtp_fix, inspect, bench, verify, publish, watch, deploy, worker, store):
    cli.add_command(each)


def main() -> None:
    """Entry point: every expected failure is one sentence on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    bypass_proxy_on_loopback(os.environ)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for handler in logging.getLogger().handlers:
        handler.addFilter(Plain())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended well, as by Ctrl-C
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as error:
        _fail(error.format_message() + (f" ({error.ctx.command_path} --help)" if error.ctx else ""), 2)
    except RecipeError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted: what was finished is kept, and the same command goes on from there", 130)
    except RequantError as error:
        _fail(str(error), 1)
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        _fail(str(explained), 1)


def _fail(sentence: str, status: int) -> None:
    sentence = redact(sentence)
    if "--json" in sys.argv:
        click.echo(json.dumps({"status": "failed", "error": sentence}))
    click.echo(f"requant: {sentence}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
