"""What the Hub stand-in says of a card's front matter: no more is let through than the Hub lets through."""

from __future__ import annotations

import pytest

from infra.dev.hub.card import check_card, metadata
from requant.tasks.card.card import make_card
from tests.factories.cards import FACTS, card_of


def card(front: str) -> str:
    return f"---\n{front}\n---\n# Model\n"


@pytest.mark.parametrize("front", [
    "license: apache-2.0", "license: other\nlicense_name: qwen\nlicense_link: LICENSE", "language: [en, zh-Hans, code]",
    "base_model: Qwen/Qwen3.6-27B\nbase_model_relation: quantized", "base_model: [a/b, c/d]",
    "pipeline_tag: image-text-to-text\ntags: [auto-round, int4]\nlibrary_name: transformers", "unknown: {a: 1}",
])  # fmt: skip
def test_what_models_have_is_valid(front: str) -> None:
    assert check_card(card(front))[0] == []


@pytest.mark.parametrize("front", [
    "license: Apache 2.0", "license: 5", "license_link: javascript:alert(1)", "language: [english please]",
    "base_model: nowhere", "base_model: {a: b}", "base_model_relation: made-from", "pipeline_tag: [text-generation]",
    "tags: [1]", "- a list", "license: *x",
])  # fmt: skip
def test_what_the_hub_refuses_is_refused(front: str) -> None:
    assert len(check_card(card(front))[0]) == 1 and metadata(card(front)) is None


def test_our_own_front_matter_is_valid() -> None:

    assert check_card(make_card(FACTS)) == ([], ['"license" is missing in the metadata of the card'])
    assert metadata(make_card(FACTS)) == card_of()[0]
