"""`recipe.yaml`: the recipe of a release. Another run of it makes the same result."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from requant.tasks.card.facts import CardFacts
from requant.tasks.redaction import public

# The group size of `quantize`. Those of single layers are indented further.
NO_GROUP_SIZE = re.compile(r"^  group_size: null$", re.MULTILINE)


def recipe_text(facts: CardFacts) -> str:
    """Write the recipe as YAML, with base and texts pinned, and without anything about the machine of the run."""
    recipe = facts.recipe
    document: dict[str, Any] = json.loads(recipe.model_dump_json(exclude_unset=True))
    document["base"]["revision"] = facts.base.sha
    if "calibration" in document.get("quantize", {}):
        document["quantize"]["calibration"] = facts.calibration
    if "text" in document.get("validation", {}):
        document["validation"]["text"] = facts.measured.text
    if document.get("benchmark", {}).get("engine", "").startswith("url:"):
        document["benchmark"].pop("engine")  # it is the address of a private server
    document.pop("hardware", None)  # it has the price of the author's machine
    text = yaml.safe_dump(public(document), sort_keys=False, allow_unicode=True)
    # A number would change the stage keys, so null stays, and a comment names the number.
    return NO_GROUP_SIZE.sub(rf"\g<0>  # the scheme's: {recipe.quantize.asked.group_size}", text)


def reads_local_files(facts: CardFacts) -> bool:
    """Check whether the recipe names a local file as a text, which is not published."""
    return any(text.startswith("/") for text in (facts.recipe.quantize.calibration, facts.recipe.validation.text))
