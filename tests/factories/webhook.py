"""Payloads of the Hub's webhooks, version 3."""

from __future__ import annotations

from typing import Any

REPO = "Qwen/Qwen3.6-27B"


def payload(**changes: Any) -> dict[str, Any]:
    """A new commit on a model's main branch; `changes` are entries of its parts."""
    parts: dict[str, Any] = {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {"type": "model", "name": REPO, "id": "6", "private": False, "head_sha": "f" * 40},
        "updatedRefs": [{"ref": "refs/heads/main", "oldSha": "0" * 40, "newSha": "f" * 40}],
        "webhook": {"id": "1", "version": 3},
    }
    return {**parts, **{name: {**parts[name], **change} for name, change in changes.items()}}
