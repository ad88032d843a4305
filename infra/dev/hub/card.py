"""The YAML at the top of a model card, and the checks that the Hub makes of it."""

import re
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)

# The patterns that the Hub asks of the fields that it reads. Each field is a text or a list of texts.
_REPO = r"[\w.-]{1,96}/[\w.-]{1,96}"
_PATTERNS = {
    "license": r"[a-z0-9.+-]+",
    "license_name": r"[a-z0-9-.]+",
    "license_link": r"LICENSE|LICENSE\.md|https?://\S+",
    "language": r"[a-z]{2,3}(-[A-Za-z]+)?|multilingual|code",
    "library_name": r"[\w.+-]+",
    "pipeline_tag": r"[a-z0-9]+(-[a-z0-9]+)*",
    "tags": r".+",
    "datasets": r"[\w./-]+",
    "base_model": _REPO,
    "base_model_relation": "adapter|merge|quantized|finetune",
}


def _fits(key: str, loaded: dict[str, Any]) -> bool:
    value = loaded[key]
    may_be_list = key in {"license", "language", "tags", "datasets", "base_model"}
    values = value if isinstance(value, list) and may_be_list else [value]
    return all(isinstance(text, str) and re.fullmatch(_PATTERNS[key], text) for text in values)


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Return the errors, for which the Hub refuses a card, and the warnings."""
    match = _FRONT_MATTER.search(text)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        loaded = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML in the metadata of the card: {error}"], []
    if not isinstance(loaded, dict):
        return ["The metadata of the card must be a mapping of names to values"], []
    if wrong := [
        f'"{key}" is not valid: {loaded[key]!r}' for key in _PATTERNS if key in loaded and not _fits(key, loaded)
    ]:
        return wrong, []
    return [], [] if "license" in loaded else ['"license" is missing in the metadata of the card']


def metadata(text: str) -> dict[str, Any] | None:
    """Return the metadata of a card, if it has any and it is valid."""
    match = _FRONT_MATTER.search(text)
    if match is None or check_card(text)[0]:
        return None
    loaded: dict[str, Any] = yaml.safe_load(match[1])
    return loaded


def base_model_tags(metadata: dict[str, Any]) -> list[str]:
    """Return the tags that the Hub makes of a card's `base_model`. It also guesses a relation that the card lacks."""
    named = metadata.get("base_model", [])
    bases = named if isinstance(named, list) else [named]
    relation = metadata.get("base_model_relation")
    return [f"base_model:{base}" for base in bases] + [f"base_model:{relation}:{base}" for base in bases if relation]
