"""`requant mtp-fix`: repair the MTP head of any checkpoint, in place or by a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

import click

from requant.flows import api
from requant.flows.cli.command import CommandResult, command
from requant.tasks.checkpoint.config import HeadPrecision

if TYPE_CHECKING:
    from requant.tasks.checkpoint.document import MtpFixDocument


MAX_PROBLEMS = 10  # in the text; the JSON document has all


@command("mtp-fix")
@click.argument("checkpoint")
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="Take the head from this base: a folder, or repo_id[@revision], of which only the head is fetched. Of a repo "
    "on the Hub, the default is the base that its card names.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(HeadPrecision)),
    default="keep",
    show_default=True,
    help="Keep the head bit for bit, or round its layers to INT8 or INT4, which makes it smaller.",
)
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
@click.option("--pull-request", is_flag=True, help="Open a pull request with the repair in a repo. Needs HF_TOKEN.")
def mtp_fix(
    checkpoint: str, base: str | None, precision: HeadPrecision, dry_run: bool, pull_request: bool
) -> CommandResult:
    """Repair the MTP head of a folder, or of a repo by pull request.

    CHECKPOINT is a folder, or repo_id[@revision]. Its index, total_size and both quantization configs are corrected
    too, and missing tokenizer and processor files are added. Without --base, a quantized head is dequantized if neither
    vLLM nor SGLang drafts with it; what its quantization lost stays lost.

    Of a repo, only what is needed is fetched, and nothing is sent without --pull-request. Exit status 1: no engine
    will draft with the head.

    \b
    Examples:
      requant mtp-fix Qwen3.6-27B-w4g128 --base Qwen/Qwen3.6-27B --dry-run
      requant mtp-fix Qwen3.6-27B-w4g128 --base Qwen/Qwen3.6-27B --precision int8
      requant mtp-fix someone/Qwen3.6-27B-GPTQ --pull-request
    """
    document = api.mtp_fix(checkpoint, base=base, precision=precision, dry_run=dry_run, pull_request=pull_request)
    tried = dry_run or (document.repo is not None and not pull_request)
    refused = all(verdict.mtp is False for verdict in document.engines.values())
    text = "\n".join(_lines(checkpoint, document, precision, tried))
    return CommandResult(document.to_json(), text, 1 if refused and not tried else 0)


def _lines(checkpoint: str, result: MtpFixDocument, precision: HeadPrecision, tried: bool) -> Iterator[str]:
    from requant.tasks.repairing.description import head_text

    name = checkpoint if result.repo is None else f"{result.repo}@{result.sha}"
    if not result.writes:
        yield f"{name}: nothing to repair"
    else:
        done = "would be repaired" if tried else "repaired" + (" in a pull request" if result.repo else "")
        yield f"{name}: {done}, {head_text(result, precision)}"
    if result.base:
        yield f"base         {result.base}"
    writes, removes = ("would write", "would remove") if tried else ("wrote", "removed")
    for path in result.writes:
        yield f"{writes:12} {path}{_size_text(result.sizes.get(path))}"
    yield from (f"{removes:12} {path}" for path in result.removes)
    if result.before and result.after and result.writes:
        yield f"download     {result.download_bytes:,} bytes of tensors"
        yield f"upload       {result.upload_bytes:,} bytes"
        yield from (f"before       {verdict.text(engine)}" for engine, verdict in result.before.engines.items())
        yield from (f"before       {problem}" for problem in _first(result.before.problems))
        yield from (f"after        {verdict.text(engine)}" for engine, verdict in result.after.engines.items())
        yield from (f"after        {problem}" for problem in _first(result.after.problems) or ["no problem"])
    else:
        yield from (f"{engine:10} {verdict.text(engine)}" for engine, verdict in result.engines.items())
    if result.pull_request:
        yield f"{'pull request' if result.changed else 'open already'} {result.pull_request}"
    elif result.repo and result.writes:
        yield "nothing was sent: --pull-request opens a pull request with these changes"


def _first(problems: Sequence[str]) -> list[str]:
    more = [f"and {len(problems) - MAX_PROBLEMS} more problems"] if len(problems) > MAX_PROBLEMS else []
    return [*problems[:MAX_PROBLEMS], *more]


def _size_text(size_bytes: int | None) -> str:
    """Return the bytes to upload of a file in a repo; nothing for a file in a folder."""
    return "" if size_bytes is None else f"  {size_bytes:,} bytes" if size_bytes else "  renamed on the Hub"
