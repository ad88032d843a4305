"""The repo that is published to: may this account write there, who may read it, and is it as we left it?"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import LocalTokenNotFoundError

from requant.tasks.errors import HubError
from requant.tasks.hub.client import hub_api, hub_errors
from requant.tasks.hub.manifest import read_release
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.recipe.recipe import Publish


def check_target(publish: Publish, base: Revision) -> None:
    """Find out before any work whether a release of `base` could be published. Raises HubError, HubUnavailable.

    A target that someone changed is refused here if it holds a release of another commit of this base. What was made of
    the same commit, or of a base by another name, may be what this run will come to, and is looked at again then.
    """
    api, repo_id = hub_api(), publish.repo_id
    with hub_errors(repo_id):
        try:
            account = api.whoami()
        except LocalTokenNotFoundError as error:
            raise HubError(f"publishing to {repo_id} needs HF_TOKEN: set it to a token that may write there") from error
        if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise HubError(f"HF_TOKEN may only read: set it to a token that may write to {repo_id}")
        names = {account.get("name"), *(org.get("name") for org in account.get("orgs") or [])}
    if repo_id.split("/")[0] not in names:
        open_target(publish, base)  # not every token lists what it may write to: the Hub itself must say
    if publish.collection is not None:
        with hub_errors(f"collection {publish.collection}"):
            api.get_collection(publish.collection)
    with hub_errors(repo_id):
        there = api.repo_exists(repo_id)
        if there and not publish.pull_request:  # which anyone may open
            api.auth_check(repo_id, write=True)
    if there:
        refuse_changed(resolve(repo_id), base, overwrite=publish.overwrite, before_work=True)


def open_target(publish: Publish, base: Revision) -> Revision:
    """Make the repo if there is none, and let no one read it whom the recipe, or else the base, keeps out.

    What the recipe does not say follows the base, and opens nothing that is closed already. Returns its main.
    """
    api, repo_id = hub_api(), publish.repo_id
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=base.private if publish.private is None else publish.private, exist_ok=True)
    main = resolve(repo_id)
    private = (main.private or base.private) if publish.private is None else publish.private
    gated = (main.gated or base.gated or "open") if publish.gated is None else publish.gated
    changes: dict[str, Any] = {}
    if private != main.private:
        changes["private"] = private
    if gated != (main.gated or "open"):
        changes["gated"] = False if gated == "open" else gated
    if changes:
        with hub_errors(repo_id):
            api.update_repo_settings(repo_id, **changes)
    return main


def refuse_changed(main: Revision, base: Revision, *, overwrite: bool, before_work: bool = False) -> None:
    """Raise HubError if a release of `base` would replace what Requant did not put there: another model, or words and
    files that someone else changed since. `before_work`: only if it surely would."""
    if overwrite or not any(file.path.endswith(".safetensors") for file in main.files):
        return
    claimed = read_release(main)
    if claimed is None:
        raise HubError(f"{main.repo_id} holds a model that Requant did not make: publish to a repo of its own")
    if before_work and (claimed.base_repo_id != base.repo_id or claimed.base_sha == base.sha):
        return
    if claimed.base_repo_id != base.repo_id:
        raise HubError(
            f"{main.repo_id} holds a release made of {claimed.base_repo_id}, not of {base.repo_id}: publish to a repo "
            "of its own, or set publish.overwrite: true"
        )
    if changed := claimed.differences(main):
        raise HubError(
            f"{main.repo_id} was changed by someone else since release {claimed.tag} ({join_problems(changed)}): "
            "look at it, then undo that, or set publish.overwrite: true"
        )


def join_problems(sentences: list[str]) -> str:
    """The first of some sentences, and how many more there are."""
    return sentences[0] + (f", and {len(sentences) - 1} more" if len(sentences) > 1 else "")
