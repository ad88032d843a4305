"""What a quantization config says about an MTP head, in the words of each method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.config import ModelConfig, QuantizationConfig
from requant.tasks.checkpoint.exclusions import unquantized_entries, with_head_entries, without_head_entries
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.mtp import Head, find_head

FULL = {"bits": 16, "data_type": "fp"}
AUTO_ROUND = QuantizationConfig(quant_method="auto-round", bits=4)
APART = {
    "mtp.fc.weight": (8, 16),
    "mtp.norm.weight": (8,),
    "mtp.pre_fc_norm_hidden.weight": (8,),
    "mtp.layers.0.self_attn.q_proj.weight": (8, 8),
    "mtp.layers.0.self_attn.q_norm.weight": (4,),
    "mtp.layers.0.mlp.experts.gate_up_proj": (4, 8, 8),
    "mtp.layers.0.mlp.gate.weight": (4, 8),
}
INLINED = {
    "model.layers.2.eh_proj.weight": (8, 16),
    "model.layers.2.enorm.weight": (8,),
    "model.layers.2.self_attn.o_proj.weight": (8, 8),
    "model.layers.2.mlp.gate.e_score_correction_bias": (4,),
}
MAIN = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
COUNTED = ModelConfig(num_hidden_layers=2, num_nextn_predict_layers=1)


def head_and_tensors(shapes: dict[str, tuple[int, ...]]) -> tuple[Head, dict[str, Tensor]]:
    head = find_head(shapes, COUNTED)
    assert head is not None
    return head, {n: Tensor(n, "BF16", s, Path("x"), 0, 0) for n, s in shapes.items()}


def test_the_entries_name_matrices_exactly_and_all_of_the_head_by_a_regex() -> None:
    head, tensors = head_and_tensors(APART)
    entries = unquantized_entries(head, tensors)
    modules = ("mtp.fc", "mtp.layers.0.mlp.gate", "mtp.layers.0.mlp.experts", "mtp.layers.0.self_attn.q_proj")
    assert entries == dict.fromkeys((".*mtp.*", *modules), FULL)


@pytest.mark.parametrize("shapes", [APART, INLINED], ids=["apart", "inlined"])
def test_a_regex_covers_every_module_of_the_head_and_no_other(shapes: dict[str, tuple[int, ...]]) -> None:
    """SGLang matches with re.fullmatch, vLLM with re.search; both skip a key without a metacharacter."""
    head, tensors = head_and_tensors(shapes)
    patterns = [key for key in unquantized_entries(head, tensors) if "*" in key]
    assert patterns
    for name in shapes:
        module = name.rsplit(".", 1)[0]
        assert any(re.fullmatch(p, module) and re.search(p, module) for p in patterns)
    for name in MAIN:
        assert not any(re.search(p, name) for p in patterns)


@pytest.mark.parametrize("shapes", [APART, INLINED], ids=["apart", "inlined"])
def test_saying_that_the_head_is_not_quantized_twice_says_it_once(shapes: dict[str, tuple[int, ...]]) -> None:
    head, tensors = head_and_tensors(shapes)
    once = with_head_entries(
        QuantizationConfig({**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 8}}}), head, tensors
    )
    assert with_head_entries(once, head, tensors) == once
    assert once["extra_config"]["lm_head"] == {"bits": 8} and once["bits"] == 4
    assert len(once["extra_config"]) == 1 + len(unquantized_entries(head, tensors))


@pytest.mark.parametrize("shapes", [APART, INLINED], ids=["apart", "inlined"])
def test_what_was_said_of_the_head_can_be_taken_back(shapes: dict[str, tuple[int, ...]]) -> None:
    head, tensors = head_and_tensors(shapes)
    before = QuantizationConfig({**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 8}}})
    assert without_head_entries(with_head_entries(before, head, tensors), head) == before


def test_what_auto_round_says_of_a_head_is_replaced_and_not_kept() -> None:
    head, tensors = head_and_tensors(APART)
    extra = {"mtp.fc": {"bits": 4}, "mtp.layers.0.self_attn.q_proj": {"bits": 4}, ".*mtp.fc.*": FULL}
    wrong = QuantizationConfig({**AUTO_ROUND, "extra_config": extra})
    assert with_head_entries(wrong, head, tensors)["extra_config"] == unquantized_entries(head, tensors)


def test_an_inlined_head_of_one_digit_is_not_taken_for_a_layer_of_two() -> None:
    head = find_head(["model.layers.1.x.weight"], ModelConfig(num_hidden_layers=1, num_nextn_predict_layers=1))
    extra = {"model.layers.1.x": FULL, "model.layers.10.x": {"bits": 8}}
    stated = QuantizationConfig(extra_config=extra)
    assert without_head_entries(stated, head) == {"extra_config": {"model.layers.10.x": {"bits": 8}}}


def test_a_config_is_copied_and_never_changed() -> None:
    head, tensors = head_and_tensors(APART)
    before = QuantizationConfig({**AUTO_ROUND, "extra_config": {"mtp.fc": {"bits": 4}}})
    with_head_entries(before, head, tensors)["extra_config"]["mtp.fc"]["bits"] = 99
    assert before == {**AUTO_ROUND, "extra_config": {"mtp.fc": {"bits": 4}}}


@pytest.mark.parametrize("extra", [None, [], "mtp"], ids=repr)
def test_an_extra_config_that_is_no_mapping_is_left_as_it_is(extra: Any) -> None:
    head, _ = head_and_tensors(APART)
    assert without_head_entries(QuantizationConfig(extra_config=extra), head) == {"extra_config": extra}
