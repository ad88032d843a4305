"""Which layers a plan packs and keeps, and what it refuses. tests/integration/test_plan_auto_round.py compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.planning.layers import choose_layers, standard_regex
from requant.tasks.planning.output import plan_output
from requant.tasks.planning.reasons import why_kept
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.quantize_section import Quantize
from tests.factories.pico import pico_base

BLOCKS = "model.language_model.layers"


def test_a_pattern_that_names_a_layer_that_cannot_be_packed_is_told(tmp_path: Path) -> None:
    base = Checkpoint.open(pico_base(tmp_path / "base"))
    chosen = choose_layers(base, Quantize(layers={"linear_attn": {"bits": 8}}))
    assert "keeps all 5 layers that it names in 16 bits" in chosen.notes[0] and "in_proj_" in chosen.notes[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": {"lm_head": {"bits": 8}}}, "asks to quantize lm_head, which lies in no decoder block"),
        ({"layers": {"mlp": {"bits": 8}}}, "asks to quantize model.visual.blocks.0.mlp.linear_fc1"),
        ({"layers": {"up_proj": {"bits": 8, "sym": False}}}, "8 bits with sym false"),
        ({"layers": {"up_proj": {"data_type": "fp"}}}, "needs bits: 16"),
        ({"layers": {"up_proj": {"bits": 8}}, "format": "auto_round:auto_awq"}, "holds 4 bits only, not 8"),
        ({"group_size": 128, "format": "auto_round:auto_awq"}, "group_size 128 does not divide the 64 inputs of"),
        ({"group_size": 256}, "group_size 256 does not divide the 64 inputs of"),
        ({"layers": {"mlp.(up": {"bits": 8}}}, "is no regular expression"),
        ({"layers": {BLOCKS: {"bits": 16}}}, "no layer would be quantized"),
    ],
)
def test_what_auto_round_or_the_packing_cannot_do_is_a_problem(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    base = Checkpoint.open(pico_base(tmp_path / "base"))
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"group_size": 32, **changes}})
    assert sentence in " ".join(plan_output(base, recipe, {}).problems)


@pytest.mark.parametrize("key", ["mlp.gate", "mlp.gate$", "mlp.*gate", "^model", "layers.(0|1).mlp", "a[0-9]+.b"])
def test_names_are_read_as_auto_round_reads_them(key: str) -> None:
    from auto_round.utils import to_standard_regex

    assert standard_regex(key) == to_standard_regex(key)


def test_the_reason_of_a_kept_layer_is_known_from_the_recipe_alone() -> None:
    names = [f"{BLOCKS}.0.mlp.{part}.weight" for part in ("up_proj", "down_proj")]
    names += [f"{BLOCKS}.0.norm.bias", "lm_head.weight"]
    why = why_kept(names, {"up_proj": {"bits": 16}, "gate_proj": {"bits": 8}})
    assert set(why) == {f"{BLOCKS}.0.mlp.up_proj", f"{BLOCKS}.0.mlp.down_proj"}
    assert "quantize.layers" in why[f"{BLOCKS}.0.mlp.up_proj"] and "32" in why[f"{BLOCKS}.0.mlp.down_proj"]
