"""What acceptance is measured on: pieces of the pinned text, all of one length and all over it."""

from __future__ import annotations

from infra.dev.engines.prompts import places
from requant.tasks.texts.text import EVALUATION


def test_places_are_spread_from_the_start_of_the_text_to_its_end() -> None:
    text = EVALUATION.read_text(encoding="utf-8")
    found = places(100, 240)
    assert {len(piece) for piece in found} == {240} and found[0] == text[:240]
    step = (len(text) - 240) // 100
    at = 0
    for piece in found[1:]:  # a piece may stand in the text twice: it is looked for where it must be
        at = text.index(piece, at + step, at + step + 241)
    assert 0 <= len(text) - 240 - at <= step + 1
