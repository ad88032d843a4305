"""Parts of the base's card that a release takes over.

A stranger wrote that card, so only a few known parts of the expected form are taken.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from requant.tasks.card.filters import Markdown, fence
from requant.tasks.recipe.recipe import NOT_YAML

# Keys of the front matter, with the form that the Hub allows for their values.
INHERITED = {
    "license": r"[a-z0-9][a-z0-9.+-]{0,63}",
    "license_name": r"[a-z0-9][a-z0-9.-]{0,63}",
    "license_link": r"LICENSE|LICENSE\.md|https://[A-Za-z0-9.-]{1,100}(/[A-Za-z0-9._~/+-]{0,150})?",
    "language": r"[a-z]{2,3}(-[A-Za-z]{2,8})?|multilingual|code",
    "pipeline_tag": r"[a-z0-9]{1,30}(-[a-z0-9]{1,30}){0,8}",
}
LISTS = {"license", "language"}  # keys that may have several values
REPO = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
MAX_BASES = 8  # of a merge
MAX_CITATION = 8 << 10  # characters
FENCE = re.compile(r"`{3,}|~{3,}")
BIBTEX = re.compile(r"@\w{1,40}\s*\{")


def inherited(base_card: str) -> dict[str, Any]:
    """Read the keys of INHERITED from the front matter, if their values have the form that it allows."""
    document = _front_matter(base_card)
    return {key: document[key] for key in INHERITED if _is_allowed(key, document.get(key))}


def is_license(value: object) -> bool:
    """Check whether a card's value of `license` has the form that is taken over."""
    return _is_allowed("license", value)


def stated_bases(base_card: str) -> list[str]:
    """Read the repos that the front matter names as `base_model`. Whatever cannot be a repo's name is left out."""
    stated = _front_matter(base_card).get("base_model")
    names = stated if isinstance(stated, list) else [stated]
    return [name for name in names[:MAX_BASES] if isinstance(name, str) and re.fullmatch(REPO, name)]


def _front_matter(base_card: str) -> dict[Any, Any]:
    match = re.match(r"---\r?\n(.{0,65536}?)\r?\n---", base_card, re.DOTALL)
    try:
        document = yaml.safe_load(match[1]) if match else None
    except NOT_YAML:
        document = None
    return document if isinstance(document, dict) else {}


def _is_allowed(key: str, value: object) -> bool:
    values = value if isinstance(value, list) and key in LISTS else [value]
    return bool(values) and all(isinstance(v, str) and re.fullmatch(INHERITED[key], v) for v in values)


def cited(base_card: str) -> Markdown | None:
    """Return the first fenced BibTeX block, with a new fence and without characters that do not print.

    The card is read in one pass over its lines, so that no card takes long. None if there is no such block.
    """
    fence_of_block, block = "", [""]
    for line in base_card.splitlines():
        words = line.strip()
        if not fence_of_block:
            opening = FENCE.match(words)
            fence_of_block, block = opening[0] if opening else "", []
        elif words.startswith(fence_of_block) and not words.strip(fence_of_block[0]):
            text = "\n".join("".join(filter(str.isprintable, row.expandtabs(2))).rstrip() for row in block).strip()
            if BIBTEX.match(text) and len(text) <= MAX_CITATION:
                return fence(text, "bibtex")
            fence_of_block = ""
        else:
            block.append(line)
    return None
