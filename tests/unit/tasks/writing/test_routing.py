"""Tokens are counted where experts get them, whatever way a model has of giving them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.expert_counts import counting_experts
from requant.tasks.validating.model import RunSettings, Skeleton
from requant.tasks.writing import routing
from requant.tasks.writing.routing import count_routed, has_experts
from tests.factories.bases import other_base
from tests.factories.pico import pico_base

ON_CPU = RunSettings(torch.device("cpu"), torch.float32)
ROWS = [list(range(10, 30)), list(range(100, 107)), list(range(300, 340))]


def skeleton_of(base: Path) -> Skeleton:
    return Skeleton(Checkpoint.open(base), ON_CPU)


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "mixtral"])
def test_each_token_of_each_row_is_counted_once_for_each_of_its_experts(tmp_path: Path, kind: str) -> None:
    own = {"num_local_experts": 4, "num_experts_per_tok": 2}
    base = pico_base(tmp_path / "b", experts=4) if kind == "qwen3_5_moe" else other_base(tmp_path / "b", kind, **own)
    counted = count_routed(skeleton_of(base), ROWS)
    assert counted.modules == ("0.mlp.experts", "1.mlp.experts") and counted.tokens.shape == (3, 2, 4)
    assert (counted.tokens.sum(axis=2) == [[2 * len(row)] * 2 for row in ROWS]).all()


def test_the_counts_are_those_of_the_routers_own_choice(tmp_path: Path) -> None:
    """Against the model as a whole, whose routers are asked what they choose."""
    skeleton = skeleton_of(pico_base(tmp_path / "b", experts=4))
    skeleton.hold()
    chosen: list[torch.Tensor] = []
    for block in skeleton.blocks:
        block.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2].flatten()))
    with torch.inference_mode():
        skeleton.model(input_ids=torch.tensor([ROWS[0]]))
    direct = torch.stack([torch.bincount(experts, minlength=4) for experts in chosen])
    assert (count_routed(skeleton, ROWS[:1]).tokens[0] == direct.numpy()).all()


def test_rows_that_do_not_pass_together_are_counted_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = skeleton_of(pico_base(tmp_path / "b", experts=4))
    together = count_routed(skeleton, ROWS)
    monkeypatch.setattr(routing, "MAX_TOKENS_AT_ONCE", 28)
    assert (count_routed(skeleton, ROWS).tokens == together.tokens).all()


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    assert not has_experts(skeleton_of(pico_base(tmp_path / "dense")))
    assert has_experts(skeleton_of(pico_base(tmp_path / "routed", experts=4)))


class OneModuleAnExpert(nn.Module):
    """A mixture of experts as models with code of their own write it: even tokens go to 0, odd ones to 1 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.experts[0](hidden[::2]), self.experts[1](hidden[1::2]), self.experts[2](hidden[1::2])])


def test_experts_that_are_modules_of_their_own_are_counted_by_what_they_get() -> None:
    block = nn.ModuleDict({"mlp": OneModuleAnExpert()})
    with counting_experts(block) as counted:
        block["mlp"](torch.zeros(5, 2))
    block["mlp"](torch.zeros(5, 2))
    assert {name: tokens.tolist() for name, tokens in counted.items()} == {"mlp.experts": [3, 2, 2, 0]}
