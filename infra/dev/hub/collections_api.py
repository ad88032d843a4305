"""Collections: lists of repositories under a title.

As on the Hub, an item that is already listed answers 409, and a repository that the caller cannot see 404.
"""

import re
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Body

from infra.dev.hub.access import Caller, HubError, HubState, Writer
from infra.dev.hub.hub import Hub
from infra.dev.hub.repository import now

router = APIRouter(prefix="/api/collections")
Collection = dict[str, Any]
JsonBody = Annotated[dict[str, Any], Body()]


@router.post("")
def create(hub: HubState, writer: Writer, body: JsonBody) -> Collection:
    owner = body["namespace"]
    if not writer.owns(f"{owner}/"):
        raise HubError(403, f"You don't have the rights to create a collection under {owner}.")
    words = re.sub(r"[^a-z0-9]+", "-", body["title"].lower()).strip("-")
    slug = f"{owner}/{words}-{secrets.token_hex(12)}"
    hub.collections[slug] = {
        "slug": slug,
        "title": body["title"],
        "owner": {"name": owner},
        "items": [],
        "position": 0,
        "private": body.get("private", False),
        "theme": "green",
        "upvotes": 0,
        "description": body.get("description"),
        "lastUpdated": now(),
    }
    return hub.collections[slug]


@router.get("/{namespace}/{slug}")
def read(hub: HubState, caller: Caller, namespace: str, slug: str) -> Collection:
    collection = _find(hub, namespace, slug)
    if collection["private"] and not (caller and caller.owns(f"{namespace}/")):
        raise HubError(404, "Collection not found")
    return collection


@router.post("/{namespace}/{slug}/items")
def add_item(hub: HubState, writer: Writer, namespace: str, slug: str, body: JsonBody) -> Collection:
    if not writer.owns(f"{namespace}/"):
        raise HubError(403, f"You don't have the rights to write to {namespace}/{slug}.")
    item = body["item"]
    repository = hub.find(f"{item['type']}s", item["id"])
    if repository is None or (repository.state.private and not writer.owns(item["id"])):
        raise HubError(404, f"{item['type']} {item['id']} not found")
    with hub.lock:
        collection = _find(hub, namespace, slug)
        if any((other["type"], other["id"]) == (item["type"], item["id"]) for other in collection["items"]):
            raise HubError(409, "The item is already in the collection")
        collection["items"].append({"_id": secrets.token_hex(12), **item, "position": len(collection["items"])})
        return collection


def _find(hub: Hub, namespace: str, slug: str) -> Collection:
    collection = hub.collections.get(f"{namespace}/{slug}")
    if collection is None:
        raise HubError(404, "Collection not found")
    return collection
