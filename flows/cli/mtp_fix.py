"""`requant mtp-fix`: repair the MTP head of any checkpoint in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from requant.flows import api
from requant.flows.cli.command import EXISTING_FOLDER, CommandResult, command
from requant.tasks.checkpoint.config import HeadPrecision

if TYPE_CHECKING:
    from requant.tasks.checkpoint.document import MtpFixDocument


@command("mtp-fix")
@click.argument("folder", type=EXISTING_FOLDER)
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="Take the head from this base: a folder, or repo_id[@revision], of which only the head is fetched.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(HeadPrecision)),
    default="keep",
    show_default=True,
    help="Keep the head bit for bit, or round its layers to INT8 or INT4, which makes it smaller.",
)
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
def mtp_fix(folder: Path, base: str | None, precision: HeadPrecision, dry_run: bool) -> CommandResult:
    """Repair the MTP head of an existing checkpoint, in place.

    FOLDER is the checkpoint. Its index, total_size and quantization configs are corrected too: shards that the index
    does not name are put into it, and a missing index is written. With --base, missing tokenizer and processor files
    are added. Without --base, a quantized head is dequantized if neither vLLM nor SGLang drafts with it; what its
    quantization lost stays lost. The result is judged before anything changes. Exit status 1: no engine will
    draft with the head, or there are problems and mtp-fix can repair none of them.

    \b
    Examples:
      requant mtp-fix Qwen3.6-27B-w4g128 --base Qwen/Qwen3.6-27B --dry-run
      requant mtp-fix Qwen3.6-27B-w4g128 --base Qwen/Qwen3.6-27B --precision int8
    """
    document = api.mtp_fix(folder, base=base, precision=precision, dry_run=dry_run)
    refused = not dry_run and all(verdict.mtp is False for verdict in document.engines.values())
    stuck = bool(document.problems) and not document.writes
    return CommandResult(
        document.to_json(), _repair_text(folder, document, precision, dry_run), 1 if refused or stuck else 0
    )


def _repair_text(folder: Path, result: MtpFixDocument, precision: HeadPrecision, dry_run: bool) -> str:
    lines = [f"{engine:12} {verdict.text(engine)}" for engine, verdict in result.engines.items()]
    lines += [f"{'problem':12} {problem}" for problem in result.problems]
    if not result.writes:
        what = "nothing that mtp-fix can repair" if result.problems else "nothing to repair"
        return "\n".join([f"{folder}: {what}", *lines])
    done = "would be repaired" if dry_run else "repaired"
    writes, removes = ("would write", "would remove") if dry_run else ("wrote", "removed")
    first = [f"{folder}: {done}, {_head_text(result, precision)}"]
    first += [f"{writes:12} {name}" for name in result.writes]
    return "\n".join([*first, *(f"{removes:12} {name}" for name in result.removes), *lines])


def _head_text(result: MtpFixDocument, precision: HeadPrecision) -> str:
    if not result.tensors_restored:
        return "no tensor of the head differs"
    tensors = f"{result.tensors_restored} tensors of the head"
    if result.source == "dequantized":
        return f"{tensors} dequantized (lossy)"
    return f"{tensors} from the base" + (f", its layers rounded to {precision.upper()}" if precision != "keep" else "")
