"""`requant validate`: measure any checkpoint against its base, and apply the gates."""

from __future__ import annotations

from pathlib import Path

import click

from requant.flows import api
from requant.flows.cli.command import CommandResult, command


@command("validate")
@click.argument("checkpoint")
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
def validate(checkpoint: str, base: str, recipe: Path | None) -> CommandResult:
    """Measure a checkpoint against its base and apply the gates.

    CHECKPOINT is the quantized one: a folder, or repo_id[@revision], which is downloaded into the store. Everything
    that can be measured is measured, even if a gate has failed already. Differences from the base that do not change
    the computation, as in transformers_version of config.json, are reported as findings and fail no gate. The same
    holds for a different dtype, from which engines choose the type that they compute in. Exit status 1: a gate failed.

    \b
    Examples:
      requant validate build/result --base Qwen/Qwen3.6-27B
      requant validate build/result --base build/base --recipe recipe.yaml
      requant validate someone/Qwen3.6-27B-GPTQ --base Qwen/Qwen3.6-27B
    """
    from requant.flows.report.terminal import validation_text
    from requant.tasks.validating.gates import measured_quality, refusal

    document = api.validate(checkpoint, base=base, recipe=recipe)
    lines = [validation_text(document).rstrip("\n"), *(f"finding: {sentence}" for sentence in document.findings)]
    if not measured_quality(document.gates):
        lines.append(f"not passed: {refusal(document.gates)}")
    return CommandResult(document.to_json(), "\n".join(lines), 0 if document.passed else 1)
