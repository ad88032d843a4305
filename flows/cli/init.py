"""`requant init`: write the first recipe for a model."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import unicodedata
from pathlib import Path

import click

from requant.flows.cli.command import NEW_FILE, CommandResult, command

MAX_NAME_CHARACTERS = 60  # of a name on the Hub, which has 96 at most, before what says how it was quantized
log = logging.getLogger(__name__)


@command("init")
@click.argument("model")
@click.option(
    "--recipe", "path", type=NEW_FILE, metavar="FILE", help="Write this file instead of one of the model's name."
)
@click.option("--force", is_flag=True, help="Replace the recipe if it exists.")
def init(model: str, path: Path | None, force: bool) -> CommandResult:
    """Write a recipe to begin with for a model.

    MODEL is owner/name[@revision] of a repo on the Hub, of which a few hundred KB are fetched, or a folder. The recipe
    has comments and the keys that people change. A JSON schema is written beside it, with which an editor completes and
    checks keys.

    \b
    Examples:
      requant init Qwen/Qwen3.6-27B
      requant init me/my-finetune@v2 --recipe recipes/my-finetune.yaml
      requant init ./my-finetune
    """
    from requant.flows.cli.documents import InitDocument, InitialBase
    from requant.flows.cli.schema import recipe_schema
    from requant.tasks.checkpoint.base_check import check_kind
    from requant.tasks.checkpoint.checkpoint import Checkpoint
    from requant.tasks.checkpoint.untrusted import without_folder
    from requant.tasks.checkpoint.writer import write_file
    from requant.tasks.errors import CheckpointError
    from requant.tasks.hub.publish_target import PLACEHOLDER, Login
    from requant.tasks.hub.revision import check_repo_id, find_revision, split_name
    from requant.tasks.hub.sparse_checkout import create_checkout
    from requant.tasks.license import names_license
    from requant.tasks.local_base import find_folder
    from requant.tasks.planning.tokenizer import missing_tokenizer
    from requant.tasks.recipe.base_section import FOLDER_BEGINS
    from requant.tasks.recipe.starter import SCHEMA_FILE, Target, path_from, starter_recipe

    is_folder = os.path.isdir(model)
    if not is_folder and model.startswith(FOLDER_BEGINS):
        raise click.UsageError(f"the folder {model} does not exist: name a model's folder, or a model as owner/name")
    if is_folder:
        resolved = find_folder(Path(model))
        folder_name = Path(os.path.abspath(model)).name  # of a link, not of what it leads to
        plain = unicodedata.normalize("NFKD", folder_name).encode("ascii", "ignore").decode()
        short_name = re.sub(r"[^A-Za-z0-9.]+|\.{2,}", "-", plain)[:MAX_NAME_CHARACTERS].strip("-.") or "model"
    else:
        repo_id, revision = split_name(model)
        short_name = check_repo_id(repo_id).partition("/")[2]
    path = path or Path(f"{short_name.lower()}.yaml")
    if path.exists() and not force:
        raise click.UsageError(f"{path} exists: name another file with --recipe, or replace it with --force")
    if not is_folder:
        resolved = find_revision(repo_id, revision)
    login = Login.find()
    if login.is_refused:
        log.warning(login.unknown)
    target = Target(f"{login.name or PLACEHOLDER}/{short_name}-W4A16-AutoRound", login.unknown)
    with tempfile.TemporaryDirectory(prefix="requant-") as temporary:
        folder = Path(temporary)
        try:
            base = Checkpoint.open(create_checkout(resolved, folder)).sound()
            check_kind(base, resolved.repo_id)
            if problem := missing_tokenizer(folder, resolved.repo_id, remote_code=True):
                log.warning(problem)
        except CheckpointError as error:
            raise CheckpointError(without_folder(str(error), folder, resolved.repo_id)) from error
        name = path_from(path.parent, Path(model)) if is_folder else model
        has_license = names_license(resolved) is not False
        text = starter_recipe(name, resolved.sha or None, base, target, has_license=has_license)
    write_file(path.parent, SCHEMA_FILE, [json.dumps(recipe_schema(), indent=1).encode()])
    write_file(path.parent, path.name, [text.encode()])
    document = InitDocument(
        recipe=str(path),
        schema_file=str(path.parent / SCHEMA_FILE),
        base=InitialBase(repo_id=resolved.repo_id, sha=resolved.sha or None),
    )
    return CommandResult(
        document.to_json(),
        f"wrote {path}, and {document.schema_file} for editors: look at it, then run `requant plan {path}`",
    )
