"""The base that a repo on the Hub says it was quantized from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import HubError
from requant.tasks.hub.client import hub_api, hub_errors
from requant.tasks.hub.revision import TIMEOUT_S, Revision

QUANTIZED_TAG = "base_model:quantized:"  # The Hub adds it by the card's relation, or by what it takes the repo for.
REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def named_base(revision: Revision) -> str | None:
    """Return the id of the base that a repo's card or tags name as the one it was quantized from; None without one.

    Raises HubError for a name that no repo can have, HubUnavailable.
    """
    with hub_errors(revision.repo_id, revision.sha):
        info = hub_api().model_info(revision.repo_id, revision=revision.sha, timeout=TIMEOUT_S)
    card = info.card_data if isinstance(info.card_data, ModelCardData) else ModelCardData()
    base = quantized_from(card.get("base_model"), card.get("base_model_relation"), info.tags or ())
    if base is not None and not REPO_ID.fullmatch(base):
        raise HubError(
            f"the card of {revision.repo_id} names {shown(base)!r} as its base, which no repo can be called: name the "
            "base with --base",
            repo_id=revision.repo_id,
        )
    return base


def quantized_from(base_model: Any, relation: Any, tags: Sequence[Any]) -> str | None:
    """Return the one base that a card's `base_model` and the Hub's tags say a repo was quantized from; None otherwise.

    `relation` is the card's `base_model_relation`. A repo that was finetuned or merged has weights of its own, and one
    with several bases is a merge.
    """
    named = base_model if isinstance(base_model, list) else [base_model]
    tagged = [tag.removeprefix(QUANTIZED_TAG) for tag in tags if isinstance(tag, str) and tag.startswith(QUANTIZED_TAG)]
    bases = named if relation == "quantized" else tagged if relation is None else []
    return bases[0] if len(bases) == 1 and isinstance(bases[0], str) else None
