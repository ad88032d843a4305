"""A check before the work: will the result have a license?"""

from __future__ import annotations

from pathlib import Path

from requant.tasks.card.base_card import inherited
from requant.tasks.hub.revision import Revision
from requant.tasks.hub.sparse_checkout import read_card
from requant.tasks.planning.findings import Findings
from requant.tasks.recipe.recipe import Recipe


def license_findings(recipe: Recipe, base: Revision, checkout: Path) -> Findings:
    """Say that the results would be published without a license. `checkout` is a sparse checkout of the base.

    Raises HubError, HubUnavailable.
    """
    if all(one.publish is None or one.publish.license is not None for one in recipe.each.values()):
        return Findings()
    if "license" in inherited(read_card(base, checkout)):
        return Findings()
    why = "neither the recipe nor the card of the base names a license, so the result has none: set publish.license"
    return Findings.of("publish", warnings=[why])
