"""The Python API: the functions `plan`, `run`, `inspect`, `mtp_fix`, `validate`, `compare` and `verify`.

`import requant` exports them. Each function returns, as an object, the document that the command of its name prints
with `--json`. The modules that do the work are imported when a function is called, so that `import requant` and the
help of the command line are fast.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from requant.tasks.environment import with_package
from requant.tasks.errors import CheckpointError, RecipeError, RequantError

if TYPE_CHECKING:
    from requant.flows.report.document import RunDocument
    from requant.tasks.checkpoint.config import HeadPrecision
    from requant.tasks.checkpoint.document import InspectDocument, MtpFixDocument
    from requant.tasks.hub.verify import ReleaseCheck
    from requant.tasks.planning.document import PlanDocument
    from requant.tasks.recipe.recipe import Recipe
    from requant.tasks.validating.comparison import ComparisonDocument
    from requant.tasks.validating.document import ValidationDocument


def plan(recipe: Recipe | str | Path, *, overrides: Sequence[str] = (), elsewhere: bool = False) -> PlanDocument:
    """Return what a run of a recipe would do, how long it takes and what it costs, and what stops it (`problems`).

    `recipe` is a Recipe or the path of a YAML file. Paths in a Recipe are relative to the current folder, those in a
    file to the file's folder. `overrides` change keys of a file, as in `quantize.iters=50`. `elsewhere`: plan for
    another machine, and check neither what this one has and lacks nor the account to publish with: `notes` name the
    folders and files of the recipe that are not here. Only headers of the base's files are fetched.

    Raises RecipeError, HubError, HubUnavailable or StoreError.
    """
    loaded = read_recipe(recipe, overrides, elsewhere=elsewhere)  # before the imports that only a plan needs
    from requant.tasks.plan import plan as make_plan
    from requant.tasks.store import open_store

    return make_plan(open_store(), loaded, elsewhere=elsewhere)


def run(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    checkout: str | Path | None = None,
    force: bool = False,
) -> RunDocument:
    """Run the whole pipeline of a recipe and return its document; `status` says how it ended.

    `recipe` and `overrides` are as for `plan`. `checkout` is a folder that gets the result's files: new, empty or an
    earlier checkout; with `force`, any folder. Runs `requant run` in a subprocess, because Prefect reads its settings
    once per process. Its log goes to sys.stderr. An interrupt stops the run; the next run resumes it.

    Raises RecipeError for an impossible recipe, and RequantError if the run could not begin.
    """
    loaded = read_recipe(recipe, overrides)
    with tempfile.TemporaryDirectory(prefix="requant-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(loaded.model_dump_json(exclude_unset=True))  # JSON is YAML.
        options = [] if checkout is None else ["--checkout", str(checkout)]
        exit_status, document = _run_command(["run", str(path), "--json", *options, *(["--force"] if force else [])])
    from requant.flows.report.document import RunDocument

    if document and document.keys() != error_document("").keys():
        return RunDocument.from_json(document)
    error = str(document.get("error") or f"requant run ended with exit status {exit_status} and printed no document")
    raise RecipeError(error) if exit_status == 2 else RequantError(error)


def error_document(error: str) -> dict[str, str]:
    """Return what a command prints with `--json` instead of its own document if it could not do its work."""
    return {"status": "failed", "error": error}


def inspect(checkpoint: str | Path, *, deep: bool = False) -> InspectDocument:
    """Return how a checkpoint is quantized, what is wrong with it, and whether engines will load it.

    `checkpoint` is a folder, or `repo_id[@revision]`, of which only headers and configs are fetched. `deep`: read the
    tensors too; a repo is downloaded into the store for that.

    Raises CheckpointError if it is no checkpoint, RequantError, HubError or HubUnavailable.
    """
    from requant.tasks.checkpoint.inspect import inspect_checkpoint

    if deep or Path(checkpoint).is_dir():
        return inspect_checkpoint(local_checkpoint(checkpoint), deep=deep)
    from requant.tasks.checkpoint.untrusted import without_folder
    from requant.tasks.hub.revision import resolve_name
    from requant.tasks.hub.sparse_checkout import create_checkout

    with tempfile.TemporaryDirectory(prefix="requant-") as temporary:
        folder = Path(temporary)
        try:
            return inspect_checkpoint(create_checkout(resolve_name(str(checkpoint)), folder))
        except CheckpointError as error:
            raise CheckpointError(without_folder(str(error), folder, str(checkpoint))) from error


def mtp_fix(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    precision: HeadPrecision = "keep",
    dry_run: bool = False,
    pull_request: bool = False,
) -> MtpFixDocument:
    """Repair the MTP head of the checkpoint in a folder, in place, and return what was changed.

    `base` is the checkpoint with the original head: a folder, or `repo_id[@revision]`, of which only the head is
    fetched. Without it, a quantized head is dequantized if neither vLLM nor SGLang would draft with it. `precision` is
    `keep`, which copies the head bit for bit, or `int8` or `int4`. `dry_run`: change nothing.

    `folder` may also be a repo, `repo_id[@revision]`. Then nothing is changed, and `pull_request` opens a pull request
    with the repair; by default, `base` is the base that the repo's card names.

    Raises CheckpointError, RequantError, HubError or HubUnavailable.
    """
    if pull_request and dry_run:
        raise RecipeError("a dry run sends nothing: leave out --dry-run or --pull-request")
    if not Path(folder).is_dir():
        from requant.tasks.repairing.repo import repair_repo

        return repair_repo(str(folder), base=base, precision=precision, pull_request=pull_request)
    if pull_request:
        raise RecipeError(f"{folder} is a folder, which has no pull requests: name a repo, or leave out --pull-request")
    from requant.tasks.checkpoint.repair import RepairSource, repair

    if base is None or Path(base).is_dir():
        source = None if base is None else RepairSource(Path(base))
        return repair(Path(folder), source, precision=precision, dry_run=dry_run)
    from requant.tasks.hub.revision import resolve_name
    from requant.tasks.repairing.source import sparse_source

    with sparse_source(resolve_name(str(base))) as source:
        return repair(Path(folder), source, precision=precision, dry_run=dry_run)


def validate(
    checkpoint: str | Path, *, base: str | Path, recipe: Recipe | str | Path | None = None
) -> ValidationDocument:
    """Measure a quantized checkpoint against its base, and return the gate results; `passed` is the overall verdict.

    Each of the two is a folder, or `repo_id[@revision]`, which is downloaded into the store. The limits, the text and
    the evaluation tasks are those of `recipe`, otherwise the defaults of a recipe.

    Raises CheckpointError, RecipeError, RequantError, HubError, HubUnavailable or StoreError.
    """
    from requant.tasks.evaluating.definitions import check_tasks
    from requant.tasks.evaluation_text import text_for_measuring
    from requant.tasks.recipe.recipe import PACKED_HEADS, Gates, Validation
    from requant.tasks.store import open_store
    from requant.tasks.texts.validation import find_validation_text
    from requant.tasks.validate import validate_folders
    from requant.tasks.validating.document import ValidationDocument

    loaded = None if recipe is None else read_recipe(recipe)
    remote_code = loaded is not None and loaded.allow_remote_code
    check_tasks(loaded.eval if loaded else None)
    validation = loaded.validation if loaded else Validation()
    text = find_validation_text(validation.text)
    with tempfile.TemporaryDirectory(prefix="requant-") as scratch:
        base_folder = local_checkpoint(base)
        measured = validate_folders(
            local_checkpoint(checkpoint),
            base_folder,
            text_for_measuring(open_store(), text, Path(scratch), base_folder, remote_code),
            remote_code=remote_code,
            pack_head=loaded is not None and loaded.mtp in PACKED_HEADS,
            tasks=loaded,
            tokens=validation.tokens,
        )
    return ValidationDocument.of(measured, loaded.gates if loaded else Gates())


def compare(
    a: str | Path, b: str | Path, *, base: str | Path, recipe: Recipe | str | Path | None = None
) -> ComparisonDocument:
    """Compare two checkpoints of one base, and return by domain which one is closer to it; `answer` sums it up.

    Each of them is a folder, or `repo_id[@revision]`, which is downloaded into the store. The text is that of `recipe`,
    otherwise the default of a recipe.

    Raises CheckpointError if one cannot be run or is of another base, RecipeError, HubError, HubUnavailable or
    StoreError.
    """
    from requant.tasks.compare import compare_checkpoints, overall
    from requant.tasks.evaluation_text import text_for_measuring
    from requant.tasks.recipe.recipe import Validation
    from requant.tasks.store import open_store
    from requant.tasks.texts.validation import find_validation_text
    from requant.tasks.validating.comparison import ComparisonDocument

    loaded = None if recipe is None else read_recipe(recipe)
    validation = loaded.validation if loaded else Validation()
    remote_code = loaded is not None and loaded.allow_remote_code
    text = find_validation_text(validation.text)
    folders = [local_checkpoint(name) for name in (a, b, base)]
    with tempfile.TemporaryDirectory(prefix="requant-") as scratch:
        words = text_for_measuring(open_store(), text, Path(scratch), folders[2], remote_code)
        domains = compare_checkpoints(
            folders[0], folders[1], folders[2], words, validation.tokens, remote_code=remote_code
        )
    return ComparisonDocument(
        a=str(a), b=str(b), base=str(base), text=text.name, answer=overall(list(domains.values())), domains=domains
    )


def verify(release: str | Path, *, deep: bool = False) -> ReleaseCheck:
    """Compare a published repo, `repo_id[@revision]`, or a folder with a copy of it, with what its requant.json claims.

    `problems` has the differences. `deep`: fetch and hash every byte of a repo; nothing is stored. Of a folder, every
    byte is read in any case.

    Raises HubError if there is no such repo, HubUnavailable, or CheckpointError for a folder that cannot be read.
    """
    from requant.tasks.hub.revision import check_checkpoint_name, split_name
    from requant.tasks.hub.verify import verify_folder, verify_release

    if Path(release).is_dir():
        return verify_folder(Path(release))
    check_checkpoint_name(str(release))
    repo_id, revision = split_name(str(release))
    return verify_release(repo_id, revision, deep=deep)


def read_recipe(recipe: Recipe | str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Recipe:
    """Return a recipe, read from a YAML file unless it is one already. Its paths are absolute. Raises RecipeError.

    With `elsewhere`, it is for another machine, and this one need not have its folders and files.
    """
    from requant.tasks.recipe.loader import load_recipe, with_absolute_paths

    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides, elsewhere=elsewhere)
    if overrides:
        raise RecipeError(
            "overrides change a recipe's file, and this is a Recipe: make a changed one, with "
            "Recipe.model_validate({**recipe.model_dump(exclude_unset=True), ...})"
        )
    return with_absolute_paths(recipe, Path.cwd(), elsewhere=elsewhere)


def local_checkpoint(name: str | Path) -> Path:
    """Return the folder of what a user gave as a checkpoint: a folder, or `repo_id[@revision]`.

    A repo is downloaded into the store, and its files must not be written to. Raises RequantError for what can be
    neither, HubError, HubUnavailable or StoreError.
    """
    if Path(name).is_dir():
        return Path(name)
    from requant.tasks.download import download, find_repo
    from requant.tasks.hub.revision import check_checkpoint_name, split_name
    from requant.tasks.store import open_checked_store

    check_checkpoint_name(str(name))
    store = open_checked_store()
    revision = find_repo(store, *split_name(str(name)))
    manifest = download(store, revision).manifest
    return store.link_files(manifest, store.checkout_folder(manifest))


def _run_command(arguments: list[str]) -> tuple[int, dict[str, object]]:
    """Run `requant` and return its exit status and its JSON document, which is empty if it printed none."""
    command = [sys.executable, "-P", "-m", "requant", *arguments]  # -P: no module of the current folder is imported.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=with_package(os.environ)
    )
    assert process.stdout is not None and process.stderr is not None
    forwarding = threading.Thread(target=_forward, args=(process.stderr,), daemon=True)
    forwarding.start()
    try:
        output = process.stdout.read()
        exit_status = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        forwarding.join()
        process.stdout.close()
        process.stderr.close()
    try:
        document = json.loads(output)
    except ValueError:
        document = {}
    return exit_status, document if isinstance(document, dict) else {}


def _forward(lines: IO[str]) -> None:
    """Print the lines of a process to sys.stderr, which is the notebook's own in a notebook."""
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
