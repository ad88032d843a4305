"""`recipe.yaml`: the recipe of a release, which makes the same again."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from requant.tasks.card.facts import CardFacts
from requant.tasks.redaction import public

NO_GROUP_SIZE = re.compile(r"^  group_size: null$", re.MULTILINE)  # of quantize: those of layers are indented further


def recipe_text(facts: CardFacts) -> str:
    """Write the recipe as YAML, base and texts pinned to what they were, with nothing of the machine it ran on."""
    recipe = facts.recipe
    document: dict[str, Any] = json.loads(recipe.model_dump_json(exclude_unset=True))
    document["base"]["revision"] = facts.base.sha
    if "calibration" in document.get("quantize", {}):
        document["quantize"]["calibration"] = facts.calibration
    if "text" in document.get("validation", {}):
        document["validation"]["text"] = facts.measured["text"]
    if document.get("benchmark", {}).get("engine", "").startswith("url:"):
        document["benchmark"].pop("engine")  # the address of somebody's server
    document.pop("hardware", None)  # it holds what an hour of a machine costs
    text = yaml.safe_dump(public(document), sort_keys=False, allow_unicode=True)
    # Null keeps the stage keys that the run had; the reader is told the number that it stands for.
    return NO_GROUP_SIZE.sub(rf"\g<0>  # the scheme's: {recipe.quantize.asked[1]}", text)


def reads_local_files(facts: CardFacts) -> bool:
    """Tell whether the recipe names a text of its author's own, which is not published."""
    return any(text.startswith("/") for text in (facts.recipe.quantize.calibration, facts.recipe.validation.text))
