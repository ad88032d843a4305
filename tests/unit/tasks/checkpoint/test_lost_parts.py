"""A second scale or a zero point that one module lacks and its siblings have."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.lost_parts import lost_parts
from requant.tasks.checkpoint.modules import modules_of

NVFP4 = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"}
NVFP4_PACKED = {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"}
ASYMMETRIC = {"weight_packed": "I32", "weight_scale": "BF16", "weight_zero_point": "I32", "weight_shape": "I64"}


def told(parts: dict[str, str], without: dict[int, str], layers: int = 8) -> list[str]:
    """The sentences on a module of so many layers, some of which lack a part."""
    tensors = [
        Tensor(f"layers.{number}.mlp.up_proj.{part}", dtype, (64,), Path("shard"), 0, 64)
        for number in range(layers)
        for part, dtype in parts.items()
        if without.get(number) != part
    ]
    return list(lost_parts(modules_of(tensors).values()))


@pytest.mark.parametrize(
    ("parts", "lost"),
    [
        (NVFP4, "weight_scale_2"),
        (NVFP4_PACKED, "weight_global_scale"),
        (ASYMMETRIC, "weight_zero_point"),
        (ASYMMETRIC, "weight_shape"),
    ],
)
def test_a_part_that_the_other_layers_have_is_named(parts: dict[str, str], lost: str) -> None:
    assert told(parts, {}) == []
    (sentence,) = told(parts, {5: lost})
    assert sentence.startswith(f"layers.5.mlp.up_proj.{lost} is missing, and")
    (sentence,) = told(parts, {5: lost, 6: lost})
    assert "(and 1 more like it)" in sentence


def test_layers_with_schemes_of_their_own_lack_nothing() -> None:
    half = dict.fromkeys(range(4), "weight_zero_point")
    assert told(ASYMMETRIC, half) == []
    assert told(ASYMMETRIC, {0: "weight_zero_point"}, layers=2) == []


def test_experts_that_saw_no_token_have_no_scale_of_activations() -> None:
    assert told(NVFP4, {2: "input_scale"}) == []
