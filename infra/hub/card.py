"""The YAML at the top of a model card, and what the Hub says about it."""

import re
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors, with which the Hub refuses a card, and warnings."""
    match = _FRONT_MATTER.search(text)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        loaded = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML in the metadata of the card: {error}"], []
    if not isinstance(loaded, dict):
        return ["The metadata of the card must be a mapping of names to values"], []
    return [], [] if "license" in loaded else ['"license" is missing in the metadata of the card']


def metadata(text: str) -> dict[str, Any] | None:
    """The metadata of a card, if it has any that is valid."""
    match = _FRONT_MATTER.search(text)
    if match is None or check_card(text)[0]:
        return None
    loaded: dict[str, Any] = yaml.safe_load(match[1])
    return loaded
