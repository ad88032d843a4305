"""`recipe.yaml`: the recipe of a release. Another run of it makes the same result."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from requant.tasks.card.facts import CardFacts
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.redaction import public
from requant.tasks.texts.calibration import pin_sources

# The group size of `quantize`. Those of single layers are indented further.
NO_GROUP_SIZE = re.compile(r"^  group_size: null$", re.MULTILINE)


def recipe_text(facts: CardFacts) -> str:
    """Write the recipe as YAML, with base and texts pinned, and without anything about the machine of the run."""
    recipe = facts.recipe
    document: dict[str, Any] = json.loads(recipe.model_dump_json(exclude_unset=True))
    if facts.base.is_local:  # Nobody else has the folder, and where it lies is nobody's business.
        document["base"]["folder"] = f"./{recipe.base.name}"
    else:
        document["base"]["revision"] = facts.base.sha
    if recipe.adapter is not None and facts.base.adapter is not None:
        adapter = facts.base.adapter
        own = {"folder": f"./{recipe.adapter.name}"} if adapter.is_local else {"revision": adapter.sha}
        document["adapter"] |= own
    if "calibration" in document.get("quantize", {}):
        document["quantize"]["calibration"] = _pinned_calibration(facts)
    if "text" in document.get("validation", {}):
        document["validation"]["text"] = facts.measured.texts or facts.measured.text
    if document.get("benchmark", {}).get("engine", "").startswith("url:"):
        document["benchmark"].pop("engine")  # it is the address of a private server
    document.get("benchmark", {}).pop("base_engine", None)  # so is this
    document.pop("hardware", None)  # it has the price of the author's machine
    text = yaml.safe_dump(public(document), sort_keys=False, allow_unicode=True)
    if facts.base.is_local:
        text = text.replace("base:\n", f"base:  # whose files have the digest {facts.base.sha}\n", 1)
    # A number would change the stage keys, so null stays, and a comment names the number.
    return NO_GROUP_SIZE.sub(rf"\g<0>  # the scheme's: {recipe.quantize.asked.group_size}", text)


def reads_local_files(facts: CardFacts) -> bool:
    """Check whether the recipe names a local folder as base or adapter, or a local file: these are not published."""
    if facts.unpublished:
        return True
    texts = [source.source for source in facts.recipe.quantize.sources]
    asked = facts.recipe.validation.text
    texts += [asked] if isinstance(asked, str) else asked.values()
    return any(text.startswith("/") for text in texts)


def _pinned_calibration(facts: CardFacts) -> Any:
    """Return the key `calibration` as JSON, its sources pinned as the quantize stage recorded them."""
    quantize, recorded = facts.recipe.quantize, facts.record("quantize")
    names = [source.name for source in recorded.sources]
    if len(names) != len(quantize.sources):  # A record from before there were several sources names one.
        names = [facts.calibration] if len(quantize.sources) == 1 else [one.source for one in quantize.sources]
    pinned = Quantize(calibration=pin_sources(quantize.calibration, names))
    return pinned.model_dump(mode="json", exclude_none=True)["calibration"]
