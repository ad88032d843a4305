"""`requant validate`: the gates, for a checkpoint made by whomever."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from requant.flows.cli.arguments import resolve_repo
from requant.flows.cli.command import EXISTING_FOLDER, command


@command("validate")
@click.argument("folder", type=EXISTING_FOLDER)
@click.option(
    "--base",
    required=True,
    metavar="CHECKPOINT",
    help="Compare with this base: a folder, or repo_id[@revision], which is downloaded into the store.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take the limits of the gates, the text and the evaluation tasks from this recipe.",
)
def validate(folder: Path, base: str, recipe: Path | None) -> tuple[dict[str, Any], str, int]:
    """Measure a checkpoint against its base and apply the gates.

    FOLDER is the quantized checkpoint. Everything that can be measured is measured, even if a gate has failed already.
    Differences from the base that do not change the computation, as in transformers_version of config.json, are
    reported as findings and fail no gate. The same holds for a different dtype, from which engines choose the type that
    they compute in. Exit status 1: a gate failed.

    \b
    Examples:
      requant validate build/result --base Qwen/Qwen3.6-27B
      requant validate build/result --base build/base --recipe recipe.yaml
    """
    from requant.flows.report.terminal import gate_table
    from requant.tasks.evaluate import check_tasks
    from requant.tasks.recipe.loader import load_recipe
    from requant.tasks.recipe.recipe import PACKED_HEADS, Gates, Validation
    from requant.tasks.store import open_store
    from requant.tasks.texts.text import find_text
    from requant.tasks.validate import one_file, validate_folders
    from requant.tasks.validating.gates import accepted, judge, measured_quality, refusal

    loaded = load_recipe(recipe) if recipe else None
    gates, remote_code = (loaded.gates, loaded.allow_remote_code) if loaded else (Gates(), False)
    packed = loaded is not None and loaded.mtp in PACKED_HEADS
    tasks = loaded.eval if loaded else None
    check_tasks(tasks)
    text = find_text((loaded.validation if loaded else Validation()).text, "validation.text")
    with tempfile.TemporaryDirectory(prefix="requant-") as scratch:
        theirs = _whole(base)
        values = validate_folders(
            folder,
            theirs,
            one_file(open_store(), text, Path(scratch), theirs, remote_code),
            remote_code=remote_code,
            pack_head=packed,
            tasks=tasks,
        )
    results = judge(values, gates)
    passed = accepted(results)
    findings = values["differences"]
    document = {"gates": [gate.to_json() for gate in results], "passed": passed, "findings": findings}
    lines = [gate_table(results).rstrip("\n"), *(f"finding: {sentence}" for sentence in findings)]
    if not measured_quality(results):
        lines.append(f"not passed: {refusal(results)}")
    return document, "\n".join(lines), 0 if passed else 1


def _whole(name: str) -> Path:
    """A folder as it is; a repo brought into the store and handed out read-only."""
    if Path(name).is_dir():
        return Path(name)
    from requant.tasks.download import download
    from requant.tasks.store import open_store

    revision = resolve_repo(name)
    opened = open_store()
    opened.check()
    manifest = download(opened, revision).manifest
    return opened.link_files(manifest, opened.checkout_folder(manifest))
