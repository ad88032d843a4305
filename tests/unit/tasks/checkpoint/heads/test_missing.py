"""What an MTP head lacks: modules of its decoder layer, compared with the main model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.heads.missing import missing_modules
from requant.tasks.checkpoint.modules import modules_of
from requant.tasks.checkpoint.mtp import find_head

CONFIG = ModelConfig(
    {"architectures": ["Glm4MoeForCausalLM"], "num_hidden_layers": 1, "num_nextn_predict_layers": 1, "hidden_size": 8}
)
SPLIT = [f"mlp.experts.{e}.{n}_proj.weight" for e in range(3) for n in ("gate", "up", "down")]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["self_attn.q_proj.weight", "self_attn.q_proj.bias"]
OF_A_HEAD = [f"model.layers.1.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm")]


def lacks(main: list[str], head: list[str]) -> list[str]:
    """What the head in layer 1 lacks, beside a main model of one layer."""
    names = [*(f"model.layers.0.{name}" for name in main), *(f"model.layers.1.{name}" for name in head), *OF_A_HEAD]
    found = find_head(names, CONFIG)
    assert found is not None
    tensors = {name: Tensor(name, "BF16", (8, 8), Path("shard"), 0, 128) for name in names}
    own = modules_of(tensors[name] for name in found.names)
    return missing_modules(found, CONFIG, own, modules_of(tensors.values()))


@pytest.mark.parametrize(("main", "head"), [(SPLIT, SPLIT), (FUSED, SPLIT), (SPLIT, FUSED), (FUSED, FUSED)])
def test_experts_may_be_fused_in_one_and_split_in_the_other(main: list[str], head: list[str]) -> None:
    assert lacks([*main, *ATTENTION], [*head, *ATTENTION]) == []


@pytest.mark.parametrize("lost", SPLIT)
def test_a_lost_matrix_of_one_expert_is_named(lost: str) -> None:
    head = [name for name in SPLIT if name != lost]
    assert lacks([*SPLIT, *ATTENTION], [*head, *ATTENTION]) == [f"model.layers.1.{lost.removesuffix('.weight')}"]


def test_a_lost_kind_of_matrix_is_named_once() -> None:
    head = [name for name in SPLIT if "down" not in name]
    assert lacks([*SPLIT, *ATTENTION], [*head, *ATTENTION]) == ["model.layers.1.mlp.experts.down_proj"]


def test_a_module_of_which_only_the_bias_is_left_is_missing() -> None:
    assert lacks([*SPLIT, *ATTENTION], [*SPLIT, ATTENTION[1]]) == ["model.layers.1.self_attn.q_proj"]
