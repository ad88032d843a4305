"""The repo that is published to: checks of write access, of changes by others, and its visibility."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalTokenNotFoundError

from requant.tasks.errors import HubError, HubUnavailable
from requant.tasks.hub.client import hub_api, hub_errors, offline_variable
from requant.tasks.hub.manifest import read_release
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.recipe.quantize_section import NAME_PATTERN
from requant.tasks.recipe.recipe import Publish

PLACEHOLDER = (
    "YOU"  # the owner of a repo in the examples of the documentation, and in a recipe of `init` without a token
)


@dataclass(frozen=True)
class Account:
    """The account of the token at hand: the names that it may create repos under, itself and organizations.

    `lists_all`: no other names are possible. A token that is limited to some repos need not list all.
    """

    namespaces: frozenset[str]
    lists_all: bool
    name: str = ""  # of the account itself

    @classmethod
    def of_token(cls, repo_id: str) -> Account:
        """Ask whose token is at hand, to publish to `repo_id`. Raises HubError without one that may write."""
        with hub_errors(repo_id):
            try:
                account = hub_api().whoami()
            except LocalTokenNotFoundError as error:
                raise HubError(
                    f"publishing to {repo_id} needs HF_TOKEN: set it to a token that may write there, or log in with "
                    "hf auth login",
                    repo_id=repo_id,
                ) from error
        role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise HubError(f"HF_TOKEN may only read: set it to a token that may write to {repo_id}", repo_id=repo_id)
        owners = [account, *(org for org in account.get("orgs") or [] if org.get("roleInOrg") != "read")]
        namespaces = frozenset(str(owner.get("name")) for owner in owners)
        return cls(namespaces, role in {"write", "admin"}, str(account.get("name") or ""))

    @property
    def token(self) -> str:
        """What a sentence calls the token."""
        return f"the token of {self.name}" if self.name else "this token"


@dataclass(frozen=True)
class TargetCheck:
    """What is wrong with a target, and what could not be checked, in sentences."""

    problems: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


def check_target(publish: Publish, base: Revision, account: Account, *, bits: int, create: bool) -> TargetCheck:
    """Check before any work whether a release of `base` could be published by an account. Raises HubUnavailable.

    `bits` are those of the quantized weights. With `create`, a repo of an owner that the account does not name is
    created, as only that shows whether it may be.
    A changed target is refused here only if it holds a release of another commit of this base. Otherwise the run may
    lead to the artifact that the target holds already, which is known only when the run publishes.
    """
    problems: list[str] = []
    unchecked: list[str] = []
    check_repo = partial(_check_repo, publish, base, account, bits=bits, create=create)
    for check in (check_repo, partial(_check_collection, publish)):
        try:
            unchecked += check()
        except HubUnavailable:
            raise
        except HubError as error:
            problems.append(str(error))
    return TargetCheck(tuple(problems), tuple(unchecked))


def _check_repo(publish: Publish, base: Revision, account: Account, *, bits: int, create: bool) -> Sequence[str]:
    """Raise HubError for what is wrong with the repo. Return what could not be checked."""
    api, repo_id = hub_api(), publish.repo_id
    owner = repo_id.split("/")[0]
    if owner == PLACEHOLDER and owner not in account.namespaces:
        raise HubError(
            f"{repo_id} has the placeholder {owner} in place of an owner: write the name of your account"
            f"{f', as {account.name}{repo_id.removeprefix(owner)}' if account.name else ''}",
            repo_id=repo_id,
        )
    with hub_errors(repo_id):
        exists = api.repo_exists(repo_id)
    if exists and not publish.pull_request:  # anyone may open a pull request
        with _named_refusal(account, repo_id, "write to"), hub_errors(repo_id):
            api.auth_check(repo_id, write=True)
    sure = owner in account.namespaces and account.lists_all
    if exists:
        warning = refuse_changed(resolve(repo_id), base, bits, overwrite=publish.overwrite, before_work=True)
        return [warning] if warning else []
    if not sure and create:
        with _named_refusal(account, repo_id, "create"):
            open_target(publish, base)
    elif owner not in account.namespaces and account.lists_all:
        raise HubError(
            f"{account.token} may not create {repo_id}: it may create repos under "
            f"{', '.join(sorted(account.namespaces))}; correct the name, or set HF_TOKEN to a token of {owner}",
            repo_id=repo_id,
        )
    elif not sure:
        return [f"not checked: whether this token may create {repo_id}, which a run tries before it does anything else"]
    return []


@contextlib.contextmanager
def _named_refusal(account: Account, repo_id: str, deed: str) -> Iterator[None]:
    """Say of a refusal in this block whose token it is, which may surprise a user with several accounts."""
    try:
        yield
    except HubError as error:
        cause = error.__cause__
        if (
            isinstance(cause, HfHubHTTPError)
            and cause.response.status_code == 403
            and not isinstance(cause, GatedRepoError)
        ):
            owner = repo_id.split("/")[0]
            raise HubError(
                f"{account.token} may not {deed} {repo_id} (403): correct the name, or set HF_TOKEN to a token "
                f"that may write to repos of {owner}",
                repo_id=repo_id,
            ) from error
        raise


def _check_collection(publish: Publish) -> Sequence[str]:
    """Raise HubError if there is no such collection."""
    if publish.collection is not None:
        with hub_errors(f"collection {publish.collection}"):
            hub_api().get_collection(publish.collection)
    return []


@dataclass(frozen=True)
class Login:
    """Who publishes: the name of the account whose token is at hand, or None, and why it is not known.

    `is_refused`: there is a token, and the Hub does not accept it.
    """

    name: str | None
    unknown: str = ""
    is_refused: bool = False

    @classmethod
    def find(cls) -> Login:
        """Ask the Hub. Raises HubUnavailable."""
        if is_offline_mode():
            return cls(None, f"the Hub is switched off by {offline_variable()}, so that your account is not known")
        with hub_errors("the account of HF_TOKEN"):
            try:
                name = hub_api().whoami().get("name")
            except LocalTokenNotFoundError:
                return cls(None, "there is no token: log in with `hf auth login`, or set HF_TOKEN")
            except HfHubHTTPError as error:
                if error.response.status_code not in {401, 403}:
                    raise
                return cls(
                    None,
                    "the Hub refuses your token: log in again with `hf auth login`, or set another HF_TOKEN",
                    True,
                )
        if isinstance(name, str) and re.fullmatch(NAME_PATTERN, name):
            return cls(name)
        return cls(None, "the Hub does not say whose token it is")


def open_target(publish: Publish, base: Revision) -> Revision:
    """Create the repo if there is none, and set who may read it. Return the revision of its `main`.

    Where the recipe does not say who may read it, a private or gated base or adapter makes the repo private or gated
    too, and a repo that is private or gated stays so. Nobody says who may read what lies in a folder: then a new repo
    is private, and one that is there stays as it is.
    """
    api, repo_id = hub_api(), publish.repo_id
    with hub_errors(repo_id):
        new = base.is_restricted if publish.private is None else publish.private
        api.create_repo(repo_id, private=new, exist_ok=True)
    main = resolve(repo_id)
    sources = [main, base, *([base.adapter] if base.adapter else [])]
    private = any(one.private for one in sources) if publish.private is None else publish.private
    inherited = [one.gated for one in sources if one.gated is not None]
    gated = publish.gated or (inherited[0] if inherited else "open")
    new_private = None if private == main.private else private
    new_gated = None if gated == (main.gated or "open") else False if gated == "open" else gated
    if new_private is not None or new_gated is not None:
        with hub_errors(repo_id):
            api.update_repo_settings(repo_id, private=new_private, gated=new_gated)
    return main


def refuse_changed(
    main: Revision, base: Revision, bits: int, *, overwrite: bool, before_work: bool = False
) -> str | None:
    """Raise HubError if a release of `base` would replace another model, one with other bits, or changes that someone
    else made since the last release.

    With `before_work`, raise it only where the run cannot lead to the release that is there already. Return a sentence
    if it would be raised after the work, unless the result is the same.
    """
    if overwrite or not any(file.path.endswith(".safetensors") for file in main.files):
        return None
    claimed = read_release(main)
    if claimed is None:
        raise HubError(
            f"{main.repo_id} holds a model that Requant did not make: publish to a repo of its own",
            repo_id=main.repo_id,
        )
    if before_work and claimed.model_name != base.model_name:
        return (
            f"{main.repo_id} holds a release made of {claimed.model_name}: unless the result is the same, one made of "
            f"{base.model_name} is refused at the end; set publish.overwrite: true, or publish to a repo of its own"
        )
    if claimed.model_name == base.model_name and claimed.bits not in {None, bits}:
        raise HubError(
            f"{main.repo_id} holds a release with {claimed.bits} bits, and this one has {bits}: publish to a repo "
            "of its own, or set publish.overwrite: true",
            repo_id=main.repo_id,
        )
    if before_work and claimed.base_sha == base.sha:
        return None
    if claimed.model_name != base.model_name:
        raise HubError(
            f"{main.repo_id} holds a release made of {claimed.model_name}, not of {base.model_name}: publish to a repo "
            "of its own, or set publish.overwrite: true",
            repo_id=main.repo_id,
        )
    if changed := claimed.differences(main):
        raise HubError(
            f"{main.repo_id} was changed by someone else since release {claimed.tag} ({join_problems(changed)}): "
            "look at it, then undo that, or set publish.overwrite: true",
            repo_id=main.repo_id,
        )
    return None


def join_problems(sentences: list[str]) -> str:
    """Return the first of some sentences, and the number of the others."""
    return sentences[0] + (f", and {len(sentences) - 1} more" if len(sentences) > 1 else "")
