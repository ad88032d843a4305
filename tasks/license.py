"""A check before the work: will the result have a license?"""

from __future__ import annotations

from requant.tasks.artifact import CARD, MAX_CARD_BYTES
from requant.tasks.card.base_card import inherited, is_license
from requant.tasks.hub.revision import Revision
from requant.tasks.planning.findings import Findings
from requant.tasks.recipe.recipe import Recipe


def license_findings(recipe: Recipe, base: Revision) -> Findings:
    """Say that the results would be published without a license."""
    if all(one.publish is None or one.publish.license is not None for one in recipe.each.values()):
        return Findings()
    if names_license(base) is not False:
        return Findings()
    why = "neither the recipe nor the card of the base names a license, so the result has none: set publish.license"
    return Findings.of("publish", warnings=[why])


def names_license(base: Revision) -> bool | None:
    """Check whether the card of a base names a license that its quantized models take over. None if it is not known."""
    if base.folder is None:
        return None if base.license is None else is_license(base.license)
    card = base.folder / CARD
    if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return False
    return "license" in inherited(card.read_text(encoding="utf-8", errors="replace"))
