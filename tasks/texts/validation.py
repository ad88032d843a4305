"""The text that `validation.text` of a recipe names: one for all domains, or one for each."""

from __future__ import annotations

from collections.abc import Mapping

from requant.tasks.artifact import digest_of
from requant.tasks.texts.text import Text, find_text

KEY = "validation.text"


def find_validation_text(source: str | Mapping[str, str]) -> Text:
    """Find the text to measure on, or one for each domain. Raises RecipeError, HubError, HubUnavailable."""
    if isinstance(source, str):
        return find_text(source, KEY)
    domains = tuple((domain, find_text(name, f"{KEY}.{domain}")) for domain, name in source.items())
    name = ", ".join(f"{domain}: {part.name}" for domain, part in domains)
    return Text(name, digest_of([(domain, part.digest) for domain, part in domains]), domains=domains)
