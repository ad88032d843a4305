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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tasks.artifact import Manifest
from tasks.checkpoint.writer import write_file, write_json
from tasks.errors import RecipeError, RequantError, explain_os_error, redact
from tasks.log import Plain
from tasks.store import open_store

NEW_FOLDER = click.Path(path_type=Path, file_okay=False)
NEW_FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
F = TypeVar("F", bound=Callable[..., Any])


def command(group: click.Group, name: str) -> Callable[[F], click.Command]:
    """A command that returns (document, text, exit status) and gets --json."""

    def wrap(function: F) -> click.Command:
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> None:
            document, text, status = function(**arguments)
            click.echo(redact(json.dumps(document, indent=1) if as_json else text))
            sys.exit(status)

        option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
        return group.command(name)(option(run))

    return wrap


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="requant")
def cli() -> None:
    """Quantize a Hugging Face base model, prove that the result works, publish it."""


@command(cli, "run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as in quantize.iters=50.")
@click.option("--checkout", type=NEW_FOLDER, help="Lay the result's files into this folder.")
@click.option("--report", "report_path", type=NEW_FILE, help="Write the JSON document here too.")
def run(
    recipe: Path, overrides: tuple[str, ...], checkout: Path | None, report_path: Path | None
) -> tuple[dict[str, Any], str, int]:
    """Run the whole pipeline, here and now."""
    from tasks.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    open_store()  # a wrong REQUANT_STORE is a wrong usage, found before anything starts
    from flows.embedded import embedded_prefect

    with embedded_prefect():
        from flows.requantize import RunFailed, requantize
        from flows.terminal import render

        try:
            report = requantize(loaded)
        except RunFailed as failure:
            report = failure.report
    _lay_out(report, checkout)
    if report_path is not None:
        write_json(report_path.parent, report_path.name, report.to_json())
    return report.to_json(), render(report), 0 if report.status in {"published", "validated"} else 1


def _lay_out(report: Any, checkout: Path | None) -> None:
    """Give the result a path: a checkout of the user's own, or read-only links beside a local store."""
    store = open_store()
    if report.artifact is None or not (checkout or store.is_local):
        return
    if checkout is not None:
        report.path = store.checkout(report.artifact, checkout).resolve()
    else:
        folder = store.near.root / "checkouts" / report.artifact.digest
        report.path = store.hand_out(report.artifact, folder)
    if report.card is not None:
        write_file(report.path, "README.md", [report.card.encode()])
    else:
        (report.path / "README.md").unlink(missing_ok=True)  # an earlier run's


@command(cli, "validate")
@click.argument("folder", type=FOLDER)
@click.option("--base", required=True, help="The base: a folder, or repo_id[@revision].")
@click.option("--recipe", type=click.Path(path_type=Path), help="Take the gates' limits from this recipe.")
def validate(folder: Path, base: str, recipe: Path | None) -> tuple[dict[str, Any], str, int]:
    """Measure a quantized checkpoint against its base and apply the gates."""
    from flows.terminal import gate_table
    from tasks.gates import compare
    from tasks.recipe import Gates, load_recipe
    from tasks.validate import validate_folders

    loaded = load_recipe(recipe) if recipe else None
    gates, remote_code = (loaded.gates, loaded.allow_remote_code) if loaded else (Gates(), False)
    results = compare(validate_folders(folder, _base_folder(base), remote_code=remote_code), gates)
    passed = all(gate.passed for gate in results)
    document = {"gates": [gate.to_json() for gate in results], "passed": passed}
    return document, gate_table(results), 0 if passed else 1


@command(cli, "mtp-fix")
@click.argument("folder", type=FOLDER)
@click.option("--base", help="The base: a folder, or repo_id[@revision].")
def mtp_fix(folder: Path, base: str | None) -> tuple[dict[str, Any], str, int]:
    """Repair the MTP head of an existing checkpoint, in place."""
    from tasks.checkpoint.repair import repair

    result = repair(folder, _base_folder(base) if base else None)
    changed = "repaired" if result["changed"] else "nothing to repair"
    return result, f"{folder}: {changed}, {result['tensors_restored']} tensors restored from {result['source']}", 0


@command(cli, "inspect")
@click.argument("checkpoint")
def inspect(checkpoint: str) -> tuple[dict[str, Any], str, int]:
    """Say from headers and config alone what is quantized how, and whether MTP will work in each engine.

    A Hub repo is brought into the store whole first.
    """
    from tasks.checkpoint.inspect import as_text, inspect_checkpoint

    result = inspect_checkpoint(_base_folder(checkpoint))
    return result, as_text(checkpoint, result), 1 if result["problems"] else 0


@cli.group()
def store() -> None:
    """Look at and into the store (REQUANT_STORE)."""


@command(store, "ls")
def store_ls() -> tuple[dict[str, Any], str, int]:
    """List the artifacts."""
    opened = open_store()
    opened.check()
    rows: list[dict[str, Any]] = [
        {
            "stage": entry.stage,
            "key": entry.key,
            "digest": entry.manifest.digest,
            "files": len(entry.manifest.files),
            "bytes": entry.manifest.size,
            "started": entry.provenance.get("started"),
        }
        for entry in opened.entries()
    ]
    rows.sort(key=lambda row: str(row["started"] or ""))
    text = "\n".join(f"{r['stage']:10} {r['digest'][:12]} {r['bytes']:>16,} {r['started']}" for r in rows)
    return {"store": opened.url, "artifacts": rows}, text or f"{opened.url} is empty", 0


@command(store, "verify")
@click.option("--deep", is_flag=True, help="Hash every blob, not only look whether it is there.")
def store_verify(deep: bool) -> tuple[dict[str, Any], str, int]:
    """Check that every artifact's blobs are there."""
    from tasks.store.verify import verify

    opened = open_store()
    opened.check()
    checked, problems = verify(opened, deep=deep)
    text = "\n".join([f"{checked} blobs checked, {len(problems)} problems", *problems])
    return {"checked": checked, "problems": problems}, text, 1 if problems else 0


@command(store, "checkout")
@click.argument("digest")
@click.argument("folder", type=click.Path(path_type=Path))
def store_checkout(digest: str, folder: Path) -> tuple[dict[str, Any], str, int]:
    """Lay the artifact whose digest begins with DIGEST into FOLDER."""
    opened = open_store()
    opened.check()
    found = {e.manifest.digest: e.manifest for e in opened.entries() if e.manifest.digest.startswith(digest)}
    if len(found) != 1:
        raise RequantError(f"{len(found)} artifacts in {opened.url} begin with {digest!r}: see requant store ls")
    ((whole, manifest),) = found.items()
    path = opened.checkout(manifest, folder).resolve()
    return {"digest": whole, "path": str(path)}, f"{manifest.size:,} bytes in {path}", 0


def _base_folder(name: str) -> Path:
    """A folder as it is; a repo brought into the store and handed out read-only."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RequantError(f"{name} is not a folder: name a checkpoint's folder, or repo_id[@revision]")
    from tasks.download import download
    from tasks.hub.revision import resolve

    opened = open_store()
    opened.check()
    repo_id, _, revision = name.partition("@")
    manifest: Manifest = download(opened, resolve(repo_id, revision or "main")).manifest
    return opened.hand_out(manifest, opened.near.root / "checkouts" / manifest.digest)


def main() -> None:
    """Entry point: every expected failure is one sentence on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
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
