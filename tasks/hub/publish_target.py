"""The repo that is published to: checks of write access, of changes by others, and its visibility."""

from __future__ import annotations

import re

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from requant.tasks.errors import HubError
from requant.tasks.hub.client import hub_api, hub_errors
from requant.tasks.hub.manifest import read_release
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.recipe.quantize_section import NAME_PATTERN
from requant.tasks.recipe.recipe import Publish


def check_target(publish: Publish, base: Revision) -> None:
    """Check before any work whether a release of `base` could be published. Raises HubError, HubUnavailable.

    Refuse a changed target here only if it holds a release of another commit of this base. Otherwise the run may lead
    to the artifact that the target holds already, which is known only when the run publishes.
    """
    api, repo_id = hub_api(), publish.repo_id
    with hub_errors(repo_id):
        try:
            account = api.whoami()
        except LocalTokenNotFoundError as error:
            raise HubError(
                f"publishing to {repo_id} needs HF_TOKEN: set it to a token that may write there", repo_id=repo_id
            ) from error
        if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise HubError(f"HF_TOKEN may only read: set it to a token that may write to {repo_id}", repo_id=repo_id)
        names = {account.get("name"), *(org.get("name") for org in account.get("orgs") or [])}
    if repo_id.split("/")[0] not in names:
        open_target(publish, base)  # not every token lists all its namespaces, so try to create the repo
    if publish.collection is not None:
        with hub_errors(f"collection {publish.collection}"):
            api.get_collection(publish.collection)
    with hub_errors(repo_id):
        exists = api.repo_exists(repo_id)
        if exists and not publish.pull_request:  # anyone may open a pull request
            api.auth_check(repo_id, write=True)
    if exists:
        refuse_changed(resolve(repo_id), base, overwrite=publish.overwrite, before_work=True)


def account_name() -> str | None:
    """Return the name of the account whose token is at hand, or None without a token that the Hub accepts.

    It is None too while the Hub is switched off. Raises HubUnavailable.
    """
    if is_offline_mode():
        return None
    with hub_errors("the account of HF_TOKEN"):
        try:
            name = hub_api().whoami().get("name")
        except (LocalTokenNotFoundError, HfHubHTTPError):
            return None
    return name if isinstance(name, str) and re.fullmatch(NAME_PATTERN, name) else None


def open_target(publish: Publish, base: Revision) -> Revision:
    """Create the repo if there is none, and set who may read it. Return the revision of its `main`.

    Where the recipe does not say who may read it, a private or gated base makes the repo private or gated too, and a
    repo that is private or gated stays so. Nobody says who may read a base in a folder: then a new repo is private, and
    one that is there stays as it is.
    """
    api, repo_id = hub_api(), publish.repo_id
    with hub_errors(repo_id):
        new = base.private or base.is_local if publish.private is None else publish.private
        api.create_repo(repo_id, private=new, exist_ok=True)
    main = resolve(repo_id)
    private = (main.private or base.private) if publish.private is None else publish.private
    gated = (main.gated or base.gated or "open") if publish.gated is None else publish.gated
    new_private = None if private == main.private else private
    new_gated = None if gated == (main.gated or "open") else False if gated == "open" else gated
    if new_private is not None or new_gated is not None:
        with hub_errors(repo_id):
            api.update_repo_settings(repo_id, private=new_private, gated=new_gated)
    return main


def refuse_changed(main: Revision, base: Revision, *, overwrite: bool, before_work: bool = False) -> None:
    """Raise HubError if a release of `base` would replace another model, or changes that someone else made since the
    last release. With `before_work`, raise it only where the run cannot lead to the release that is there already."""
    if overwrite or not any(file.path.endswith(".safetensors") for file in main.files):
        return
    claimed = read_release(main)
    if claimed is None:
        raise HubError(
            f"{main.repo_id} holds a model that Requant did not make: publish to a repo of its own",
            repo_id=main.repo_id,
        )
    if before_work and (claimed.base_repo_id != base.repo_id or claimed.base_sha == base.sha):
        return
    if claimed.base_repo_id != base.repo_id:
        raise HubError(
            f"{main.repo_id} holds a release made of {claimed.base_repo_id}, not of {base.repo_id}: publish to a repo "
            "of its own, or set publish.overwrite: true",
            repo_id=main.repo_id,
        )
    if changed := claimed.differences(main):
        raise HubError(
            f"{main.repo_id} was changed by someone else since release {claimed.tag} ({join_problems(changed)}): "
            "look at it, then undo that, or set publish.overwrite: true",
            repo_id=main.repo_id,
        )


def join_problems(sentences: list[str]) -> str:
    """Return the first of some sentences, and the number of the others."""
    return sentences[0] + (f", and {len(sentences) - 1} more" if len(sentences) > 1 else "")
