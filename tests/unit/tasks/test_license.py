"""A result without a license is told before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.hub.revision import Revision
from requant.tasks.license import license_findings
from requant.tasks.recipe.loader import parse_recipe

TARGET = {"publish": {"repo_id": "me/pico"}}
LICENSED = {"publish": {"repo_id": "me/pico", "license": "mit"}}


def license_warnings(keys: dict[str, object], base: Revision) -> tuple[str, ...]:
    found = license_findings(parse_recipe({"base": "a/pico", **keys}), base)
    assert found.problems == ()
    return found.warnings


def in_folder(folder: Path, card: str | None) -> Revision:
    if card is not None:
        (folder / "README.md").write_text(card)
    return Revision("pico", "", (), folder=folder)


@pytest.mark.parametrize("card", [None, "", "# words\n", "---\nlicense: [1, 2]\n---\n", "---\nlanguage: en\n---\n"])
def test_a_result_without_a_license_is_told_before_the_run(card: str | None, tmp_path: Path) -> None:
    warnings = license_warnings(TARGET, in_folder(tmp_path, card))
    assert [one[:45] for one in warnings] == ["publish: neither the recipe nor the card of t"]


@pytest.mark.parametrize(("license", "told"), [
    ("apache-2.0", 0), (["mit", "apache-2.0"], 0), ("", 1), ("x\ny", 1), ([5], 1), (None, 0),
])  # fmt: skip
def test_of_a_base_on_the_hub_its_listing_says_so_and_what_is_not_known_is_not_told(license: object, told: int) -> None:
    assert len(license_warnings(TARGET, Revision("a/pico", "0" * 40, (), license=license))) == told


@pytest.mark.parametrize(("keys", "card"), [
    (TARGET, "---\nlicense: apache-2.0\n---\n"), (LICENSED, None), ({}, None),
])  # fmt: skip
def test_a_license_of_the_base_or_the_recipe_is_enough_and_a_store_needs_none(
    keys: dict[str, object], card: str | None, tmp_path: Path
) -> None:
    assert not license_warnings(keys, in_folder(tmp_path, card))
