"""config.json and quantization_config: what they say, whatever their fields hold, and what stays when they change."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest

from requant.tasks.checkpoint.config import ModelConfig, QuantizationConfig


def test_layers_are_counted_by_either_key() -> None:
    assert ModelConfig(mtp_num_hidden_layers=1).mtp_layers == ModelConfig(num_nextn_predict_layers=1).mtp_layers == 1
    assert ModelConfig(num_nextn_predict_layers=None).mtp_layers == ModelConfig().mtp_layers == 0


def test_dropping_zeroes_every_count_that_is_there_and_adds_none() -> None:
    config = {
        "num_nextn_predict_layers": 1,
        "text_config": {"mtp_num_hidden_layers": 2, "num_hidden_layers": 4},
        "vision_config": {"depth": 3},
    }
    assert ModelConfig(config).without_mtp_layers() == {
        "num_nextn_predict_layers": 0,
        "text_config": {"mtp_num_hidden_layers": 0, "num_hidden_layers": 4},
        "vision_config": {"depth": 3},
    }


def test_a_config_is_copied_and_never_changed() -> None:
    config = ModelConfig(text_config={"mtp_num_hidden_layers": 1, "quantization_config": {}}, own=1)
    before = repr(config)
    base = ModelConfig(text_config={"mtp_num_hidden_layers": 2})
    copies = (
        config.without_mtp_layers(),
        config.with_mtp_layers_of(base),
        config.without_quantization(),
        config.with_quantization(QuantizationConfig(bits=4)),
    )
    assert repr(config) == before and all(copy != config and copy["own"] == 1 for copy in copies)


@pytest.mark.parametrize("size", [None, 128, [128], [128, 0], [128, "128"], [True, 128]], ids=repr)
def test_an_fp8_block_is_two_positive_integers(size: Any) -> None:
    assert ModelConfig(quantization_config={"weight_block_size": size}).fp8_block is None
    nested = ModelConfig(text_config={"quantization_config": {"weight_block_size": [128, 64]}})
    assert nested.fp8_block == (128, 64)


@pytest.mark.parametrize("value", [None, 4, "4 bits", [4]], ids=repr)
def test_a_quantization_config_that_is_no_mapping_is_an_empty_one(value: Any) -> None:
    assert ModelConfig(quantization_config=value).quantization == ModelConfig().quantization == {}


@pytest.mark.parametrize(("stated", "method"), [
    ("GPTQ", "gptq"), ("compressed_tensors", "compressed-tensors"), (None, ""), (["gptq"], ""),
])  # fmt: skip
def test_a_method_has_the_spelling_of_vllm(stated: Any, method: str) -> None:
    assert QuantizationConfig(quant_method=stated).method == method


@pytest.mark.parametrize(("quantization", "fields"), [
    ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}, (4, 128, True)),
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, (4, 64, False)),
    ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": False}, (4, 128, True)),
    ({"quant_method": "fp8", "fmt": "e4m3"}, (None, None, None)),
    ({"quant_method": "compressed-tensors", "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True}}}}, (4, 32, True)),
    ({"quant_method": "compressed-tensors", "config_groups": {
        "a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}}, (None, None, None)),
], ids=lambda value: str(value)[:60])  # fmt: skip
def test_the_scheme_is_told_in_one_way_for_every_method(quantization: dict[str, Any], fields: Any) -> None:
    assert astuple(QuantizationConfig(quantization).scheme) == fields


@pytest.mark.parametrize("key", ["text_config", "llm_config"])
def test_the_language_models_part_has_either_of_two_names(key: str) -> None:
    stated = {"bits": 4}
    config = ModelConfig({key: {"num_nextn_predict_layers": 2, "quantization_config": stated}})
    assert config.mtp_layers == 2 and config.quantization == stated
    assert config.without_quantization() == {key: {"num_nextn_predict_layers": 2}}
    counted = ModelConfig({"text_config": {"num_nextn_predict_layers": 1}})
    assert config.with_mtp_layers_of(counted).text["num_nextn_predict_layers"] == 1
    assert config.with_count("num_nextn_predict_layers", 3)[key]["num_nextn_predict_layers"] == 3
