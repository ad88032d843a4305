"""Collections: lists of repositories under a title. Kept in `collections/<owner>/<slug>`, one JSON each.

As on the Hub, an item that is there already answers 409, and one of a repository that the caller cannot see 404.
"""

import json
import re
import secrets
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body

from infra.dev.hub.access import Caller, HubError, HubState, Writer
from infra.dev.hub.hub import Hub
from infra.dev.hub.repository import now

router = APIRouter(prefix="/api/collections")
Collection = dict[str, Any]
_SLUG = re.compile(r"[a-z0-9-]+-[0-9a-f]{24}")


@router.post("")
def create(hub: HubState, writer: Writer, body: Annotated[dict[str, Any], Body()]) -> Collection:
    owner = body["namespace"]
    if not writer.owns(f"{owner}/"):
        raise HubError(403, f"You don't have the rights to create a collection under {owner}.")
    words = re.sub(r"[^a-z0-9]+", "-", body["title"].lower()).strip("-")
    collection = {
        "slug": f"{owner}/{words}-{secrets.token_hex(12)}",
        "title": body["title"],
        "owner": {"name": owner},
        "items": [],
        "position": 0,
        "private": body.get("private", False),
        "theme": "green",
        "upvotes": 0,
        "description": body.get("description"),
    }
    return _save(hub, collection)


@router.get("/{namespace}/{slug}")
def read(hub: HubState, caller: Caller, namespace: str, slug: str) -> Collection:
    collection = _load(hub, namespace, slug)
    if collection["private"] and not (caller and caller.owns(f"{namespace}/")):
        raise HubError(404, "Collection not found")
    return collection


@router.post("/{namespace}/{slug}/items")
def add_item(
    hub: HubState,
    writer: Writer,
    namespace: str,
    slug: str,
    body: Annotated[dict[str, Any], Body()],
) -> Collection:
    if not writer.owns(f"{namespace}/"):
        raise HubError(403, f"You don't have the rights to write to {namespace}/{slug}.")
    item = body["item"]
    repository = hub.find(f"{item['type']}s", item["id"])
    if repository is None or (repository.settings.private and not writer.owns(item["id"])):
        raise HubError(404, f"{item['type']} {item['id']} not found")
    with hub.lock:
        collection = _load(hub, namespace, slug)
        if any((held["type"], held["id"]) == (item["type"], item["id"]) for held in collection["items"]):
            raise HubError(409, "The item is already in the collection")
        held = {"_id": secrets.token_hex(12), **item, "position": len(collection["items"])}
        note = {"note": {"html": body["note"], "text": body["note"]}} if "note" in body else {}
        collection["items"].append(held | note)
        return _save(hub, collection)


def _load(hub: Hub, namespace: str, slug: str) -> Collection:
    path = _path(hub, f"{namespace}/{slug}") if _SLUG.fullmatch(slug) else None
    if path is None or not path.is_file():
        raise HubError(404, "Collection not found")
    collection: Collection = json.loads(path.read_bytes())
    return collection


def _save(hub: Hub, collection: Collection) -> Collection:
    collection = {**collection, "lastUpdated": now()}
    hub.durable.write(_path(hub, collection["slug"]), json.dumps(collection).encode())
    return collection


def _path(hub: Hub, slug: str) -> Path:
    return hub.state / "collections" / slug
