"""Which base a card and the Hub's tags name."""

from __future__ import annotations

from typing import Any

import pytest

from requant.tasks.repairing.named_base import quantized_from

BASE = "Qwen/Qwen3.6-27B"
TAG = f"base_model:quantized:{BASE}"


@pytest.mark.parametrize(
    ("base_model", "relation", "tags", "expected"),
    [
        (BASE, "quantized", [], BASE),
        ([BASE], "quantized", [], BASE),
        (BASE, None, [TAG], BASE),  # the Hub has worked the relation out
        (None, None, [TAG], BASE),
        ("their/choice", "quantized", [TAG], "their/choice"),  # the card is the author's own word
        (BASE, None, [f"base_model:{BASE}"], None),
        (BASE, None, [f"base_model:finetune:{BASE}"], None),
        (BASE, "finetune", [TAG], None),
        (BASE, "merge", [TAG], None),
        ([BASE, "other/base"], "quantized", [], None),
        (BASE, None, [TAG, "base_model:quantized:other/base"], None),
        ([], "quantized", [TAG], None),
        (None, "quantized", [TAG], None),
        (7, "quantized", [7, None, {}], None),
        ({"a": BASE}, ["quantized"], [], None),
    ],
)
def test_only_one_base_from_which_the_repo_was_quantized_is_taken(
    base_model: Any, relation: Any, tags: list[Any], expected: str | None
) -> None:
    assert quantized_from(base_model, relation, tags) == expected
