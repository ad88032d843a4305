"""The card's parts on where it comes from: how to make it again, what made it, whose it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from requant.tasks.artifact import RECIPE, RELEASE, REPORT
from requant.tasks.card.facts import CardFacts
from requant.tasks.formatting import code, gigabytes, plain, table
from requant.tasks.redaction import public

MAX_CITATION = 8 << 10  # characters
FENCE = re.compile(r"`{3,}|~{3,}")
NO_GROUP_SIZE = re.compile(r"^  group_size: null$", re.MULTILINE)  # of quantize: those of layers are indented further
ENTRY = re.compile(r"@\w{1,40}\s*\{")
Row = tuple[str, ...]


def origin_parts(facts: CardFacts) -> list[str]:
    """How to make it again, and what made it."""
    recipe, tools = facts.recipe, [f"requant {plain(facts.version)}", *_tools(facts.provenance)]
    local = [text for text in (recipe.quantize.calibration, recipe.validation.text) if text.startswith("/")]
    lines = [
        f"With `{RECIPE}` of this repo, the recipe below, and these versions: {', '.join(tools)}. "
        f"Seed {recipe.quantize.seed}; base and calibration are pinned to what they were."
    ]
    if local:
        lines.append(
            "The recipe reads a file of its author's own, which is not published: the same is not made without it."
        )
    return [
        "## Reproduce",
        *lines,
        code(f"requant run {RECIPE}{' --set publish=null' if recipe.publish else ''}"),
        code(recipe_text(facts).rstrip(), "yaml"),
        "## Provenance",
        table(("stage", "seconds", "hardware", "tools"), [_stage_row(name, r) for name, r in facts.provenance.items()]),
        f"Base commit `{facts.base.sha}`, artifact digest `{facts.digest}`, recipe digest `{recipe.digest}`. "
        f"The sha256 of every file, the gates and each stage's record are in `{RELEASE}`; `requant verify` compares "
        f"the files with it. The whole report is `{REPORT}`.",
    ]


def recipe_text(facts: CardFacts) -> str:
    """The recipe as YAML, with base and texts pinned to what they were, and nothing of the machine it ran on."""
    recipe = facts.recipe
    document: dict[str, Any] = json.loads(recipe.model_dump_json(exclude_unset=True))
    document["base"]["revision"] = facts.base.sha
    if "calibration" in document.get("quantize", {}):
        document["quantize"]["calibration"] = calibration_of(facts)
    if "text" in document.get("validation", {}):
        document["validation"]["text"] = facts.measured["text"]
    if document.get("benchmark", {}).get("engine", "").startswith("url:"):
        document["benchmark"].pop("engine")  # somebody's server
    document.pop("hardware", None)  # and what an hour of it costs
    text = yaml.safe_dump(public(document), sort_keys=False, allow_unicode=True)
    # Null keeps the stage keys that the run had; the reader is told the number that it stands for.
    return NO_GROUP_SIZE.sub(rf"\g<0>  # the scheme's: {recipe.quantize.asked[1]}", text)


def calibration_of(facts: CardFacts) -> str:
    """The calibration text, pinned to what it was."""
    return str(facts.provenance.get("quantize", {}).get("calibration") or facts.recipe.quantize.calibration)


def license_parts(base: str, license: Mapping[str, Any], base_card: str) -> list[str]:
    """Whose it is, and how the base wants to be cited: its card's BibTeX, as text that nothing in it can leave."""
    parts = ["## License and citation"]
    if license:
        name = (
            license.get("license_name") or license["license"] if "license" in license else license.get("license_name")
        )
        parts.append(f"{plain(name)}, see the front matter of this card and [{base}](https://huggingface.co/{base}).")
    else:
        parts.append(f"The base's card names no license: see [{base}](https://huggingface.co/{base}).")
    if citation := cited(base_card):
        parts += ["The base's authors ask to be cited so:", citation]
    return parts


def cited(base_card: str) -> str | None:
    """The first BibTeX block of a card as a block of ours, without what does not print. One pass over the lines."""
    fence, block = "", [""]
    for line in base_card.splitlines():
        words = line.strip()
        if not fence:
            opening = FENCE.match(words)
            fence, block = opening[0] if opening else "", []
        elif words.startswith(fence) and not words.strip(fence[0]):
            text = "\n".join("".join(filter(str.isprintable, row.expandtabs(2))).rstrip() for row in block).strip()
            if ENTRY.match(text) and len(text) <= MAX_CITATION:
                return code(text, "bibtex")
            fence = ""
        else:
            block.append(line)
    return None


def _tools(provenance: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name and version of each tool, once; Python and torch too, as the quantize stage had them."""
    quantize = provenance.get("quantize", {})
    found = {
        "Python": (quantize.get("machine") or {}).get("python"),
        "torch": (quantize.get("settings") or {}).get("torch"),
    }
    for record in provenance.values():
        found |= record.get("tools") or {}
    return [f"{plain(name)} {plain(version)}" for name, version in found.items() if version]


def _stage_row(name: str, record: Mapping[str, Any]) -> Row:
    tools = ", ".join(f"{k} {v}" for k, v in (record.get("tools") or {}).items())
    return name, f"{record.get('seconds', 0):.1f}", _hardware(record), tools


def _hardware(record: Mapping[str, Any]) -> str:
    """The device that the stage used, where it says so, and the machine around it."""
    machine = record.get("machine") or {}
    device = (record.get("settings") or {}).get("device") or (record.get("measured") or {}).get("hardware")
    words = [str(device)] if device and device != "cpu" and not str(device).startswith("CPU") else []
    if "cpus" in machine:
        words.append(f"{machine['cpus']} CPU cores")
    if "memory_bytes" in machine:
        words.append(f"{gigabytes(machine['memory_bytes'])} of memory")
    return plain(", ".join(words))
