"""`requant validate`, `inspect` and `mtp-fix`: checkpoints that are there already, made by whomever."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.command import FOLDER, command, progress
from tasks.errors import RequantError

if TYPE_CHECKING:
    from tasks.checkpoint.header import Tensor
    from tasks.checkpoint.repair import Base


@command("validate")
@click.argument("folder", type=FOLDER)
@click.option("--base", required=True, help="The base: a folder, or repo_id[@revision].")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="Take the gates' limits and the tasks from this recipe."
)
def validate(folder: Path, base: str, recipe: Path | None) -> tuple[dict[str, Any], str, int]:
    """Measure a quantized checkpoint against its base and apply the gates.

    Everything that can be measured is, whatever else is wrong. Differences from the base that change nothing that is
    computed, as in config.json's transformers_version, are told as findings and fail nothing. So is another dtype, by
    which engines choose what they compute in.
    """
    from flows.terminal import gate_table
    from tasks.evaluate import check_tasks
    from tasks.gates import accepted, compare, measured_quality, refusal
    from tasks.recipe import PACKED_HEADS, Gates, Validation
    from tasks.recipe_file import load_recipe
    from tasks.store import open_store
    from tasks.text import find_text
    from tasks.validate import one_file, validate_folders

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
            one_file(open_store(), text, Path(scratch), theirs, remote_code, progress),
            remote_code=remote_code,
            pack_head=packed,
            tasks=tasks,
            say=progress,
        )
    results = compare(values, gates)
    passed = accepted(results)
    findings = values["differences"]
    document = {"gates": [gate.to_json() for gate in results], "passed": passed, "findings": findings}
    lines = [gate_table(results).rstrip("\n"), *(f"finding: {sentence}" for sentence in findings)]
    if not measured_quality(results):
        lines.append(f"not passed: {refusal(results)}")
    return document, "\n".join(lines), 0 if passed else 1


@command("mtp-fix")
@click.argument("folder", type=FOLDER)
@click.option("--base", help="The base: a folder, or repo_id[@revision]. Of a repo, only the head's bytes are fetched.")
@click.option(
    "--precision",
    type=click.Choice(["keep", "int8", "int4"]),
    default="keep",
    show_default=True,
    help="keep: the head bit for bit. int8, int4: its layers rounded and packed, smaller.",
)
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
def mtp_fix(folder: Path, base: str | None, precision: str, dry_run: bool) -> tuple[dict[str, Any], str, int]:
    """Repair the MTP head of an existing checkpoint, in place.

    Index, total_size, both quantization configs and missing tokenizer and processor files are put right as well.
    Without --base a packed head that no engine can load is dequantized: lossy, what the packing lost stays lost.
    """
    from tasks.checkpoint.repair import repair

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


@command("inspect")
@click.argument("checkpoint")
@click.option("--deep", is_flag=True, help="Read the data too: values that are no numbers, lossy heads. Folders only.")
def inspect(checkpoint: str, deep: bool) -> tuple[dict[str, Any], str, int]:
    """Say from headers and config alone what is quantized how, and whether MTP will work in each engine.

    CHECKPOINT is a folder, or repo_id[@revision], of which a few hundred KB are fetched. Exit status 1: problems.
    """
    from tasks.checkpoint.inspect import as_text, inspect_checkpoint

    if Path(checkpoint).is_dir():
        result = inspect_checkpoint(Path(checkpoint), deep=deep)
    elif deep:
        raise RequantError(f"--deep reads the data of a folder, and {checkpoint} is none: download it first")
    else:
        from tasks.hub.skeleton import lay_out

        with tempfile.TemporaryDirectory(prefix="requant-") as folder:
            result = inspect_checkpoint(lay_out(_resolve(checkpoint), Path(folder)))
    return result, as_text(checkpoint, result), 1 if result["problems"] else 0


@contextlib.contextmanager
def _base(name: str | None) -> Iterator[Base | None]:
    """A base to take the head from: a folder, or a repo's skeleton that is filled where it is read."""
    from tasks.checkpoint.repair import Base

    if name is None:
        yield None
    elif Path(name).is_dir():
        yield Base(Path(name))
    else:
        from tasks.hub.skeleton import fetch_files, fill, lay_out

        revision = _resolve(name)
        with tempfile.TemporaryDirectory(prefix="requant-") as temporary:
            folder = lay_out(revision, Path(temporary))

            def bring(tensors: Iterable[Tensor], files: Iterable[str]) -> None:
                fill(revision, folder, tensors)
                fetch_files(revision, folder, files)

            yield Base(folder, bring)


def _whole(name: str) -> Path:
    """A folder as it is; a repo brought into the store and handed out read-only."""
    if Path(name).is_dir():
        return Path(name)
    from tasks.download import download
    from tasks.store import open_store

    revision = _resolve(name)
    opened = open_store()
    opened.check()
    manifest = download(opened, revision).manifest
    return opened.hand_out(manifest, opened.checkout_folder(manifest))


def _resolve(name: str) -> Any:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RequantError(f"{name} is not a folder: name a checkpoint's folder, or repo_id[@revision]")
    from tasks.hub.revision import resolve

    repo_id, _, revision = name.partition("@")
    return resolve(repo_id, revision or "main")
