"""A result without a license is told before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.hub.sparse_checkout import create_placeholders
from requant.tasks.license import license_findings
from requant.tasks.recipe.loader import parse_recipe

TARGET = {"publish": {"repo_id": "me/pico"}}
LICENSED = {"publish": {"repo_id": "me/pico", "license": "mit"}}


def license_warnings(keys: dict[str, object], card: str | None, folder: Path) -> tuple[str, ...]:
    base, checkout = folder / "base", folder / "checkout"
    base.mkdir()
    files: tuple[HubFile, ...] = ()
    if card is not None:
        (base / "README.md").write_text(card)
        files = (HubFile("README.md", len(card.encode()), "", None),)
    revision = Revision("pico", "", files, folder=base)
    create_placeholders(revision, checkout)
    found = license_findings(parse_recipe({"base": "a/pico", **keys}), revision, checkout)
    assert found.problems == ()
    return found.warnings


@pytest.mark.parametrize("card", [None, "", "# words\n", "---\nlicense: [1, 2]\n---\n", "---\nlanguage: en\n---\n"])
def test_a_result_without_a_license_is_told_before_the_run(card: str | None, tmp_path: Path) -> None:
    warnings = license_warnings(TARGET, card, tmp_path)
    assert [one[:45] for one in warnings] == ["publish: neither the recipe nor the card of t"]


@pytest.mark.parametrize(("keys", "card"), [
    (TARGET, "---\nlicense: apache-2.0\n---\n"), (LICENSED, None), ({}, None),
])  # fmt: skip
def test_a_license_of_the_base_or_the_recipe_is_enough_and_a_store_needs_none(
    keys: dict[str, object], card: str | None, tmp_path: Path
) -> None:
    assert not license_warnings(keys, card, tmp_path)
