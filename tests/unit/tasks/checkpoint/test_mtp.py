"""The MTP head: which names are its own."""

from __future__ import annotations

from typing import Any

import pytest

from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.mtp import Head, find_head
from tests.factories.head_names import APART, COUNTED, INLINED, MAIN


def test_tensors_below_mtp_are_the_head_whatever_the_config_says() -> None:
    head = find_head([*MAIN, *APART], ModelConfig())
    assert head == Head("mtp", tuple(sorted(APART)))
    assert head.prefixes == ["mtp"]


def test_a_head_below_model_mtp_is_found_with_its_prefix() -> None:
    head = find_head(["model.mtp.fc.weight", "model.mtp.layers.0.x.weight", *MAIN], ModelConfig())
    assert head is not None and head.layout == "mtp" and head.prefixes == ["model.mtp"]


def test_layers_behind_the_last_one_are_the_head_if_the_config_counts_them() -> None:
    head = find_head([*MAIN, *INLINED], COUNTED)
    assert head == Head("inlined", tuple(sorted(INLINED)))
    assert head.prefixes == ["model.layers.2"]


@pytest.mark.parametrize("config", [{"num_hidden_layers": 2}, {**COUNTED, "num_nextn_predict_layers": 0}])
def test_layers_behind_the_last_one_are_the_head_even_if_the_config_counts_none(config: dict[str, Any]) -> None:
    """Nothing else reads them: they are kept, and `inspect` says that they are not counted."""
    assert find_head([*MAIN, *INLINED], ModelConfig(config)) == Head("inlined", tuple(sorted(INLINED)))
    assert find_head([*MAIN, *INLINED], ModelConfig()) is None


def test_layers_behind_the_last_one_of_which_nothing_is_known_are_an_unknown_head() -> None:
    head = find_head([*MAIN, "model.layers.2.mlp.up_proj.weight"], ModelConfig(num_hidden_layers=2))
    assert head == Head("unknown", ("model.layers.2.mlp.up_proj.weight",))


@pytest.mark.parametrize("name", ["smtp.fc.weight", "model.layers.0.mtp.fc.weight", "mtpx.weight", "mtp"])
def test_a_name_that_only_looks_like_the_heads_is_not(name: str) -> None:
    assert find_head([*MAIN, name], ModelConfig(num_hidden_layers=2, mtp_num_hidden_layers=1)) is None


@pytest.mark.parametrize(
    "name",
    ["model.visual.layers.5.x.weight", "vision_tower.encoder.layers.5.x.weight", "audio_tower.layers.5.x.weight"],
)
def test_layers_of_another_tower_are_not_the_head(name: str) -> None:
    head = find_head([*MAIN, *INLINED, name], COUNTED)
    assert head is not None and name not in head.names


def test_the_modules_of_a_head_are_everything_with_a_weight_but_norms() -> None:
    head = find_head(APART, COUNTED)
    assert head is not None
    assert head.modules == ["mtp.fc", "mtp.layers.0.mlp.gate", "mtp.layers.0.self_attn.q_proj"]
