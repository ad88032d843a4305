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
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.errors import CheckpointError
from tests.factories.head_names import APART, COUNTED, INLINED, MAIN

FULL = {"bits": 16, "data_type": "fp"}
AUTO_ROUND = QuantizationConfig(quant_method="auto-round", bits=4)


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


# Each method's own list, and entries of it that name all of the head `mtp` and all of the layer `model.layers.2`.
LISTS = {
    "modelopt": ("ignore", "mtp*", "model.layers.2.*"),
    "modelopt_fp4": ("ignore", "mtp*", "model.layers.2.*"),
    "quark": ("exclude", "re:.*mtp.*", r"re:.*model\.layers\.2\..*"),
    "compressed-tensors": ("ignore", "re:.*mtp.*", r"re:.*model\.layers\.2\..*"),
    "fp8": ("modules_to_not_convert", "mtp", "model.layers.2"),
    "awq": ("modules_to_not_convert", "mtp", "model.layers.2"),
}


@pytest.mark.parametrize("shapes", [APART, INLINED], ids=["apart", "inlined"])
@pytest.mark.parametrize("method", LISTS)
def test_a_list_of_the_methods_own_gains_the_head_and_nothing_else_changes(
    method: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    head, tensors = head_and_tensors(shapes)
    key, apart, inlined = LISTS[method]
    before = QuantizationConfig({"quant_method": method, key: ["lm_head"], "other": {"x": 1}})
    once = with_head_entries(before, head, tensors)
    assert {**once, key: ["lm_head"]} == before
    assert once[key][0] == "lm_head" and (apart if shapes is APART else inlined) in once[key]
    assert with_head_entries(once, head, tensors) == once


@pytest.mark.parametrize("method", ["modelopt", "quark", "fp8", "awq"])
def test_a_head_with_a_quantized_module_is_left_out_module_by_module(method: str) -> None:
    head, tensors = head_and_tensors(APART)
    name = "mtp.layers.0.self_attn.q_proj.weight"
    tensors[name] = Tensor(name, "F8_E4M3", (8, 8), Path("x"), 0, 0)
    key = LISTS[method][0]
    stated = QuantizationConfig({"quant_method": method, key: ["mtp", "mtp*", "re:.*mtp.*", "lm_head"]})
    listed = with_head_entries(stated, head, tensors)[key]
    assert {*listed} == {"lm_head", "mtp.fc", "mtp.layers.0.mlp.gate", "mtp.layers.0.mlp.experts"}


def test_modules_that_engines_fuse_are_followed_by_the_name_of_the_fused_layer() -> None:
    parts = ("q_proj", "k_proj", "v_proj")
    shapes = {f"mtp.layers.0.self_attn.{part}.weight": (8, 8) for part in parts} | APART
    head, tensors = head_and_tensors(shapes)
    listed = with_head_entries(QuantizationConfig(quant_method="fp8"), head, tensors)["modules_to_not_convert"]
    assert {"mtp.layers.0.self_attn.qkv_proj", "mtp.layers.0.mlp.experts"} <= {*listed}


def test_modelopts_older_form_keeps_its_own_field() -> None:
    head, tensors = head_and_tensors(APART)
    inner = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    stated = QuantizationConfig(quant_method="modelopt", quantization=inner)
    assert with_head_entries(stated, head, tensors)["quantization"] == {
        "quant_algo": "FP8",
        "exclude_modules": ["lm_head", "mtp*", "mtp.fc", "mtp.layers.0.mlp.gate", "mtp.layers.0.self_attn.q_proj",
                            "mtp.layers.0.mlp.experts"],
    }  # fmt: skip
    assert inner["exclude_modules"] == ["lm_head"]


@pytest.mark.parametrize(
    ("method", "key"), [(method, key) for method, (key, *_) in LISTS.items() if key != "modules_to_not_convert"]
)
def test_a_list_that_is_none_is_refused_and_not_replaced(method: str, key: str) -> None:
    head, tensors = head_and_tensors(APART)
    with pytest.raises(CheckpointError, match=f"{key} of quantization_config is 'lm_head', and no list"):
        with_head_entries(QuantizationConfig({"quant_method": method, key: "lm_head"}), head, tensors)


@pytest.mark.parametrize(("blocks", "left"), [
    ("model.layers,mtp.layers", "model.layers"), (["model.layers", "mtp.layers"], ["model.layers"]),
    ("model.layers", "model.layers"), ("mtp.layers", "mtp.layers"), ("model.layers,mtp", "model.layers"), (5, 5),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("key", ["block_name_to_quantize", "to_quant_block_names"])
def test_a_list_of_blocks_no_longer_names_the_head(key: str, blocks: Any, left: Any) -> None:
    head, tensors = head_and_tensors(APART)
    stated = QuantizationConfig({**AUTO_ROUND, key: blocks})
    assert with_head_entries(stated, head, tensors)[key] == left


@pytest.mark.parametrize(("scheme", "stated"), [
    (PackingScheme(8, 64), {}), (PackingScheme(4, -1), {}), (PackingScheme(2, 32), {"sym": False}),
    (PackingScheme(4, 32, "awq"), {"group_size": 64}),
], ids=str)  # fmt: skip
def test_a_packed_layer_is_described_as_its_tensors_are(scheme: PackingScheme, stated: dict[str, Any]) -> None:
    name = "mtp.layers.0.self_attn.q_proj"
    shapes = scheme.shapes(64, 128)
    tensors = {
        f"{name}.{part}": Tensor(f"{name}.{part}", dtype, shapes[part], Path("x"), 0, 0)
        for part, dtype in (("qweight", "I32"), ("qzeros", "I32"), ("scales", "F16"))
    }
    head = find_head(tensors, ModelConfig(mtp_num_hidden_layers=1))
    assert head is not None
    quantization = QuantizationConfig({**AUTO_ROUND, "group_size": 32, "sym": True, "extra_config": {name: stated}})
    entry = with_head_entries(quantization, head, tensors)["extra_config"][name]
    assert (entry["bits"], entry["group_size"]) == (scheme.bits, scheme.group_size)
    assert entry["sym"] is stated.get("sym", True)
