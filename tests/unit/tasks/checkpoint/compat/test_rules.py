"""What each engine will do with a checkpoint, by its quantization config. The rules themselves are compared with vLLM's
own classes in tests/engines; here they are told one by one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import regex

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import vllm
from requant.tasks.checkpoint.compat.rule import (
    EXPERTS,
    LM_HEAD,
    EngineScheme,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    Substrings,
    TooSlow,
)
from requant.tasks.checkpoint.config import ModelConfig, QuantizationConfig
from tests.factories.checkpoints import (
    FULL,
)
from tests.factories.quantization_configs import ENDLESS, Changes, auto_round, awq, compressed, gptq
from tests.factories.watching import watching

BODY = "model.language_model.layers"
PLAIN, INT4 = "plain", (4, 128, True)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
RENAMES = Renames((("model.language_model.", "language_model.model."),))
SLOW = "(x|xx)+y$"


def answer(config: Changes, name: str, kind: str = "linear", cls: str = "ColumnParallelLinear") -> Any:
    """What vLLM makes of a layer: `plain`, (bits, group, sym), or the reason why it refuses."""
    empty = Checkpoint(Path("x"), ModelConfig(), {}, (), None)
    try:
        rule = vllm.read_rule(QuantizationConfig(config), RENAMES, FUSED, Patterns(), empty)
        assert rule is not None
        return told(rule.scheme(Layer(name, kind, cls)))
    except NotLoadable as refusal:
        return str(refusal)


def told(scheme: EngineScheme) -> Any:
    return (scheme.bits, scheme.group_size, scheme.sym) if scheme.quantized else PLAIN


# auto-round


@pytest.mark.parametrize(("config", "name", "expected"), [
    ({}, "mtp.fc", INT4),
    ({"extra_config": {"mtp.fc": FULL}}, "mtp.fc", PLAIN),
    ({"extra_config": {"mtp.fc": {"bits": 8}}}, "mtp.fc", (8, 128, True)),
    ({"extra_config": {"mtp.fc": {}}}, "mtp.fc", PLAIN),  # an entry without bits is one of 16
    ({"extra_config": {"model.mtp.fc": FULL}}, "mtp.fc", PLAIN),
    ({"extra_config": {"fc": FULL}}, "mtp.fc", PLAIN),  # the end of a name
    ({"extra_config": {"c": FULL}}, "mtp.fc", INT4),
    ({"extra_config": {".*mtp.*": FULL}}, "mtp.layers.0.mlp.down_proj", PLAIN),
    ({"extra_config": {"mtp": FULL}}, "mtp.layers.0.mlp.down_proj", INT4),  # no pattern, no end of the name
    ({"extra_config": {"tp.*down": FULL}}, "mtp.layers.0.mlp.down_proj", PLAIN),  # anywhere in the name
    ({"extra_config": {"([": FULL}}, "mtp.fc", INT4),
    ({"block_name_to_quantize": BODY}, "mtp.fc", PLAIN),
    ({"block_name_to_quantize": f"{BODY},mtp"}, "mtp.fc", INT4),
    ({"to_quant_block_names": [BODY]}, "mtp.fc", PLAIN),
    ({"block_name_to_quantize": []}, "mtp.fc", INT4),
    ({"block_name_to_quantize": BODY}, "language_model.model.layers.0.mlp.down_proj", INT4),
    ({"block_name_to_quantize": BODY, "extra_config": {f"{BODY}.0.mlp.down_proj": FULL}},
     "language_model.model.layers.0.mlp.down_proj", PLAIN),
    ({"block_name_to_quantize": BODY, "extra_config": {".*mtp.*": {"bits": 8}}}, "mtp.fc", (8, -1, True)),
], ids=str)  # fmt: skip
def test_vllm_takes_the_exact_key_then_the_end_of_the_name_then_patterns_over_the_block_list(
    config: Changes, name: str, expected: Any
) -> None:
    assert answer(auto_round(**config), name) == expected


@pytest.mark.parametrize(("extra", "expected"), [
    ({"mtp.layers.0.self_attn.q_proj": FULL}, "differently"),
    ({f"mtp.layers.0.self_attn.{p}_proj": FULL for p in "qkv"}, PLAIN),
    ({r".*[qk]_proj": FULL}, "differently"),
    ({r".*[qkv]_proj": FULL}, PLAIN),
    ({"mtp.layers.0.self_attn.qkv_proj": FULL}, PLAIN),
], ids=str)  # fmt: skip
def test_vllm_asks_for_one_treatment_of_the_parts_of_a_fused_layer(extra: Changes, expected: str) -> None:
    assert expected in answer(auto_round(extra_config=extra), "mtp.layers.0.self_attn.qkv_proj")


def test_vllm_does_not_see_exact_keys_of_single_experts_and_sees_patterns() -> None:
    exact = {f"mtp.layers.0.mlp.experts.{n}.{p}_proj": FULL for n in range(4) for p in ("gate", "up", "down")}
    layer = ("mtp.layers.0.mlp.experts", EXPERTS, "RoutedExperts")
    assert answer(auto_round(extra_config=exact), *layer) == INT4
    assert answer(auto_round(extra_config={".*mtp.*": FULL}), *layer) == PLAIN
    assert answer(auto_round(block_name_to_quantize=BODY), *layer) == PLAIN


def test_vllm_leaves_lm_head_alone_unless_it_is_named() -> None:
    assert answer(auto_round(), "lm_head", LM_HEAD) == PLAIN
    assert answer(auto_round(extra_config={"lm_head": {"bits": 4}}), "language_model.lm_head", LM_HEAD) == INT4
    assert answer(auto_round(block_name_to_quantize="lm_head"), "lm_head", LM_HEAD) == INT4


@pytest.mark.parametrize(("config", "field"), [
    ({"bits": 16}, "bits is 16"), ({"bits": "4"}, "bits is '4'"), ({"bits": [4]}, r"bits is \[4\]"),
    ({"bits": None}, "bits is None"), ({"group_size": "x"}, "group_size"), ({"group_size": None}, "group_size"),
    ({"packing_format": "auto_round"}, "packing_format"), ({"packing_format": ["gptq"]}, "packing_format"),
    ({"backend": "exllamav2"}, "backend"), ({"data_type": "float"}, "data_type"), ({"data_type": 5}, "data_type"),
    ({"extra_config": "mtp"}, "extra_config"), ({"extra_config": {"mtp.fc": "fp16"}}, "extra_config"),
    ({"extra_config": {"mtp.fc": {"bits": None}}}, "bits of mtp.fc"), ({"block_name_to_quantize": 5}, "block_name"),
    ({"block_name_to_quantize": [None]}, "block_name"), ({"block_name_to_quantize": [[BODY]]}, "block_name"),
    ({"group_size": [128, 128]}, "group_size"), ({"quant_method": 5}, "quant_method"),
    ({"quant_method": "my-own"}, "quant_method"),
], ids=str)  # fmt: skip
def test_a_config_that_vllm_refuses_gives_a_sentence_that_names_the_field(config: Changes, field: str) -> None:
    assert re.search(field, answer(auto_round(**config), "mtp.fc"))


# GPTQ, AWQ, compressed-tensors, FP8


@pytest.mark.parametrize(("config", "expected"), [
    ({}, INT4),
    ({"dynamic": {"-:.*mtp.*": {}}}, PLAIN),
    ({"dynamic": {"-:tp.*": {}}}, INT4),  # from the beginning of the name
    ({"dynamic": {"+:mtp.*": {"bits": 8, "group_size": 32}}}, (8, 32, True)),
    ({"dynamic": {"mtp.*": {"bits": 8}, "-:mtp.*": {}}}, (8, 128, True)),  # the first that matches
    ({"dynamic": {"mtp.*": {"bits": 3}}}, "bits=3"),
    ({"dynamic": {"-:(": {}}}, "no regular expression"),
    ({"dynamic": ["mtp"]}, "dynamic is"),
    ({"modules_in_block_to_quantize": ["mlp.down_proj"]}, INT4),
    ({"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, PLAIN),
    ({"desc_act": True}, "desc_act"),
    ({"desc_act": True, "group_size": -1}, (4, -1, True)),
    ({"sym": False}, "sym=False"),
    ({"bits": 2}, "bits=2"),
], ids=str)  # fmt: skip
def test_vllm_reads_gptq_by_its_list_and_its_dynamic_rules(config: Changes, expected: Any) -> None:
    found = answer(gptq(**config), "mtp.layers.0.mlp.down_proj")
    assert found == expected or (isinstance(expected, str) and expected in found)


@pytest.mark.parametrize(("config", "expected"), [
    ({}, (4, 128, False)),
    ({"modules_to_not_convert": ["mtp"]}, PLAIN),
    ({"modules_to_not_convert": ["mlp.gate_proj"]}, "differently"),
    ({"modules_to_not_convert": ["mlp.gate_proj", "mlp.up_proj"]}, PLAIN),
    ({"modules_to_not_convert": 5}, "modules_to_not_convert"),
    ({"bits": 8}, "bits is 8"),
], ids=str)  # fmt: skip
def test_vllm_reads_awq_by_the_names_that_are_not_converted(config: Changes, expected: Any) -> None:
    found = answer(awq(**config), "mtp.layers.0.mlp.gate_up_proj")
    assert found == expected or (isinstance(expected, str) and expected in found)


@pytest.mark.parametrize(("config", "expected"), [
    (compressed([]), INT4),
    (compressed(["re:^mtp.*"]), PLAIN),
    (compressed(["mtp"]), INT4),
    (compressed(["mtp.layers.0.mlp.gate_proj"]), "differently"),
    (compressed(["mtp.layers.0.mlp.gate_proj", "mtp.layers.0.mlp.up_proj"]), PLAIN),
    (compressed([], "re:.*self_attn.*"), PLAIN),
    (compressed([], "re:.*mlp.*"), INT4),
    (compressed("lm_head"), "ignore is"),
    ({**compressed([]), "config_groups": {"group_0": {"targets": None}}}, "no list of targets"),
    ({**compressed([]), "config_groups": {"group_0": {"targets": ["Linear"]}}}, "no weights"),
    ({**compressed([]), "config_groups": 5}, "config_groups"),
], ids=str)  # fmt: skip
def test_vllm_reads_compressed_tensors_by_ignore_and_targets(config: Changes, expected: Any) -> None:
    found = answer(config, "mtp.layers.0.mlp.gate_up_proj", cls="MergedColumnParallelLinear")
    assert found == expected or (isinstance(expected, str) and expected in found)


def test_vllm_reads_fp8_by_exact_names() -> None:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert answer(config, "mtp.fc") == (8, None, True)
    assert answer({**config, "modules_to_not_convert": ["mtp.fc"]}, "mtp.fc") == PLAIN
    assert answer({**config, "modules_to_not_convert": ["mtp"]}, "mtp.fc") == (8, None, True)
    assert "activation_scheme" in answer({"quant_method": "fp8"}, "mtp.fc")


# Patterns of anybody


def test_a_pattern_that_backtracks_for_ever_ends_in_a_reason() -> None:
    patterns = Patterns()
    with watching(), pytest.raises(NotLoadable, match="does not end"):
        patterns.search(ENDLESS, "mtp.fc")
    assert patterns.hostile == [ENDLESS]


@pytest.mark.parametrize("pattern", ["(" * 500, "a" * 1001, "(?R)"], ids=["nested", "long", "recursive"])
def test_a_pattern_that_cannot_be_compiled_or_run_is_hostile(pattern: str) -> None:
    with pytest.raises(NotLoadable):
        Patterns().search(pattern, "mtp.fc")


def test_patterns_have_a_tenth_of_a_second_each_and_two_seconds_together_at_most() -> None:
    assert Patterns().search_timeout_s <= 0.1 and Patterns().total_timeout_s <= 2


def test_of_many_slow_patterns_only_the_first_are_tried() -> None:
    """Each takes all the time that one may take, which is a fifth of what all together may."""
    patterns = Patterns(search_timeout_s=0.02, total_timeout_s=0.1)
    refusals = []
    for number in range(200):
        with pytest.raises(NotLoadable) as caught:
            patterns.search(f"{SLOW}(?#{number})", "x" * 60)
        refusals.append(str(caught.value))
    assert 1 <= len(patterns.hostile) <= 6
    assert set(refusals[6:]) == {"its patterns take too long to match the names of all layers"}


@pytest.mark.parametrize("how", ["search", "fullmatch"])
@pytest.mark.parametrize(
    "pattern",
    [r".*layers\.1\.mlp\.gate.*", ".*mlp.*", r".*a\-b.*", ".*gate", "gate.*", r".*\d.*", ".*1|2.*", r".*mlp\.\bgate.*"],
)
def test_the_first_pattern_that_matches_is_the_one_that_the_engine_finds(
    how: Literal["search", "fullmatch"], pattern: str
) -> None:
    names = ["model.layers.1.mlp.gate", "model.layers.11.mlp.gate_proj", "a-b", "x\nlayers.1.mlp.gate", "2", ""]
    for name in names:
        expected = pattern if getattr(regex.compile(pattern), how)(name) else None
        assert Patterns().first(how, ["(", pattern], name) == expected


def test_routers_of_a_model_with_many_experts_are_found_without_running_a_pattern() -> None:
    """auto-round writes a pattern for the router of each layer. Run on the names of all experts, they took minutes."""
    patterns = Patterns(search_timeout_s=0.0)  # A pattern that is run takes too long.
    routers = [rf".*model\.layers\.{layer}\.mlp\.gate.*" for layer in range(94)]
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(94) for expert in range(128)]
    assert {patterns.first("search", routers, name) for name in names} == {None}
    assert patterns.first("search", routers, "model.layers.93.mlp.gate") == routers[-1]
    assert patterns.hostile == []


def test_many_plain_patterns_end_too() -> None:
    patterns = Patterns(total_timeout_s=0.0)
    with pytest.raises(TooSlow):
        patterns.first("search", [f".*{number}.*" for number in range(1000)], "x" * 1000)


def test_substrings_are_found_as_python_finds_them() -> None:
    names = Substrings.of(["mlp", "layers.1.", "fc"])
    assert names.within("mtp.layers.0.mlp.up_proj") and names.within("mtp.fc")
    assert not names.within("mtp.layers.0.self_attn.q_proj") and not Substrings.of([]).within("mtp.fc")
