"""`requant mtp-fix`: the MTP head of a checkpoint made by whomever, repaired in place."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from requant.flows.cli.arguments import resolve_repo
from requant.flows.cli.command import EXISTING_FOLDER, command

if TYPE_CHECKING:
    from requant.tasks.checkpoint.header import Tensor
    from requant.tasks.checkpoint.repair import RepairSource


@command("mtp-fix")
@click.argument("folder", type=EXISTING_FOLDER)
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="Take the head from this base: a folder, or repo_id[@revision], of which only the head is fetched.",
)
@click.option(
    "--precision",
    type=click.Choice(["keep", "int8", "int4"]),
    default="keep",
    show_default=True,
    help="Keep the head bit for bit, or round its layers to INT8 or INT4, which makes it smaller.",
)
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
def mtp_fix(folder: Path, base: str | None, precision: str, dry_run: bool) -> tuple[dict[str, Any], str, int]:
    """Repair the MTP head of an existing checkpoint, in place.

    FOLDER is the checkpoint. Its index, total_size and both quantization configs are corrected too, and missing
    tokenizer and processor files are added. Without --base, a packed head that no engine can load is dequantized;
    what its quantization lost stays lost. Exit status 1: no engine will draft with the head.

    \b
    Examples:
      requant mtp-fix Qwen3.6-27B-w4g128 --base Qwen/Qwen3.6-27B --dry-run
      requant mtp-fix Qwen3.6-27B-w4g128 --base Qwen/Qwen3.6-27B --precision int8
    """
    from requant.tasks.checkpoint.repair import repair

    with _base(base) as source:
        result = repair(folder, source, precision=precision, dry_run=dry_run)
    drafts = any(verdict["mtp"] for verdict in result["engines"].values())
    return result, _repair_text(folder, result, dry_run), 0 if drafts or dry_run else 1


def _repair_text(folder: Path, result: dict[str, Any], dry_run: bool) -> str:
    lines = [f"{engine:10} {_words(verdict)}" for engine, verdict in result["engines"].items()]
    if not result["writes"]:
        return "\n".join([f"{folder}: nothing to repair", *lines])
    done = "would be repaired" if dry_run else "repaired"
    source = "the base, bit for bit" if result["source"] == "base" else "what the packing left of them (lossy)"
    writes, removes = ("would write", "would remove") if dry_run else ("wrote", "removed")
    head = [f"{folder}: {done}, {result['tensors_restored']} tensors of the head from {source}"]
    head += [f"{writes:12} {name}" for name in result["writes"]]
    return "\n".join([*head, *(f"{removes:12} {name}" for name in result["removes"]), *lines])


def _words(verdict: dict[str, Any]) -> str:
    loads = "loads" if verdict["loads"] else "does not load"
    return f"{loads}, {'drafts' if verdict['mtp'] else 'does not draft'}: {verdict['reason']}"


@contextlib.contextmanager
def _base(name: str | None) -> Iterator[RepairSource | None]:
    """A base to take the head from: a folder, or a repo's skeleton that is filled where it is read."""
    from requant.tasks.checkpoint.repair import RepairSource

    if name is None:
        yield None
    elif Path(name).is_dir():
        yield RepairSource(Path(name))
    else:
        from requant.tasks.hub.sparse_checkout import create_checkout, fetch_files, fill

        revision = resolve_repo(name)
        with tempfile.TemporaryDirectory(prefix="requant-") as temporary:
            folder = create_checkout(revision, Path(temporary))

            def bring(tensors: Iterable[Tensor], files: Iterable[str]) -> None:
                fill(revision, folder, tensors)
                fetch_files(revision, folder, files)

            yield RepairSource(folder, bring)
