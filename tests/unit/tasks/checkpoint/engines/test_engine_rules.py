"""What each engine will do with a checkpoint, by its quantization config. The rules themselves are compared with vLLM's
own classes in tests/engines; here they are told one by one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.checkpoint.checkpoint import Checkpoint
from tasks.checkpoint.engines import Judgement, draft_problem, missing_vision_files, verdicts, vllm
from tasks.checkpoint.engines.rule import EXPERTS, LM_HEAD, Layer, Patterns, Refused, Renames, Scheme, Substrings
from tasks.checkpoint.header import Tensor
from tests.factories.checkpoints import (
    FULL,
    NARROW,
    all_tensors,
    from_bf16,
    packed_names,
    quantization_config,
    rounded,
    write_checkpoint,
)
from tests.factories.counting import calls
from tests.factories.pico import pico_base
from tests.factories.watching import watching

BODY = "model.language_model.layers"
PLAIN, INT4 = "plain", (4, 128, True)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
RENAMES = Renames((("model.language_model.", "language_model.model."),))
SLOW = "(x|xx)+y$"
ENDLESS = "(?R)"  # calls itself: the regex module is not brought down by the usual repeats of repeats
Changes = dict[str, Any]


def answer(config: Changes, name: str, kind: str = "linear", cls: str = "ColumnParallelLinear") -> Any:
    """What vLLM makes of a layer: `plain`, (bits, group, sym), or the reason why it refuses."""
    empty = Checkpoint(Path("x"), {}, {}, (), None)
    try:
        rule = vllm.read_rule(config, RENAMES, FUSED, Patterns(), empty)
        assert rule is not None
        return told(rule.scheme(Layer(name, kind, cls)))
    except Refused as refusal:
        return str(refusal)


def told(scheme: Scheme) -> Any:
    return (scheme.bits, scheme.group_size, scheme.sym) if scheme.quantized else PLAIN


def auto_round(**more: Any) -> Changes:
    return {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, **more}


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


def gptq(**more: Any) -> Changes:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, **more}


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


def awq(**more: Any) -> Changes:
    return {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, **more}


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


def compressed(ignore: Any, *targets: str) -> Changes:
    weights = {"num_bits": 4, "group_size": 128, "symmetric": True, "strategy": "group", "type": "int"}
    groups = {"group_0": {"targets": list(targets or ("Linear",)), "weights": weights}}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ignore,
    }  # fmt: skip


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
    with watching(), pytest.raises(Refused, match="does not end"):
        patterns.search(ENDLESS, "mtp.fc")
    assert patterns.hostile == [ENDLESS]


@pytest.mark.parametrize("pattern", ["(" * 500, "a" * 1001, "(?R)"], ids=["nested", "long", "recursive"])
def test_a_pattern_that_cannot_be_compiled_or_run_is_hostile(pattern: str) -> None:
    with pytest.raises(Refused):
        Patterns().search(pattern, "mtp.fc")


def test_of_many_slow_patterns_only_the_first_are_tried() -> None:
    """Each takes all the time that one may take, which is a fifth of what all together may."""
    patterns = Patterns(seconds_each=0.02, seconds=0.1)
    refusals = []
    for number in range(200):
        with pytest.raises(Refused) as caught:
            patterns.search(f"{SLOW}(?#{number})", "x" * 60)
        refusals.append(str(caught.value))
    assert 1 <= len(patterns.hostile) <= 6
    assert set(refusals[6:]) == {"its patterns take too long to match the names of all layers"}


def test_substrings_are_found_as_python_finds_them() -> None:
    names = Substrings.of(["mlp", "layers.1.", "fc"])
    assert names.within("mtp.layers.0.mlp.up_proj") and names.within("mtp.fc")
    assert not names.within("mtp.layers.0.self_attn.q_proj") and not Substrings.of([]).within("mtp.fc")


# Whole checkpoints


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_base(tmp_path / "base")


def packed(base: Path, quantization: Any, head: tuple[str, ...] = ()) -> Checkpoint:
    """The pico base with its decoder layers and these modules of its head packed."""
    tensors = all_tensors(base)
    for module in (*packed_names(tensors), *head):
        _, shape, data = tensors.pop(f"{module}.weight")
        tensors |= {f"{module}.{part}": raw for part, raw in rounded(from_bf16(data, shape))[0].items()}
    config = {**json.loads((base / "config.json").read_text()), "quantization_config": quantization}
    for shard in base.glob("*.safetensors"):
        shard.unlink()
    return Checkpoint.open(write_checkpoint(base, {"model-00001-of-00001.safetensors": tensors}, config))


def test_a_sound_checkpoint_has_nothing_in_the_way(base: Path) -> None:
    checkpoint = packed(base, quantization_config())
    fine = {"loads": True, "mtp": True, "reason": "nothing is in the way"}
    ignored = {"loads": True, "mtp": False, "reason": "transformers ignores the MTP head"}
    assert verdicts(checkpoint) == {"vllm": fine, "sglang": fine, "transformers": ignored}
    assert draft_problem(checkpoint) is None


def test_a_packed_fc_drafts_in_vllm_if_the_config_says_so_and_never_in_sglang(base: Path) -> None:
    silent = verdicts(packed(base, quantization_config(), ("mtp.fc",)))
    assert silent["vllm"]["mtp"] is False and "mtp.fc.qweight is packed" in silent["vllm"]["reason"]
    assert "block_name_to_quantize" in silent["vllm"]["reason"] and "mtp-fix" in silent["vllm"]["reason"]


def test_a_packed_fc_that_the_config_names_drafts_in_vllm_only(base: Path) -> None:
    fc = {"mtp.fc": {"bits": 4, "group_size": 32, "sym": True}}
    said = quantization_config(extra_config=NARROW | fc)
    engines = verdicts(packed(base, said, ("mtp.fc",)))
    assert engines["vllm"]["mtp"] is True and engines["sglang"]["mtp"] is False
    assert "mtp.fc.qweight is packed" in engines["sglang"]["reason"]


def test_sglang_sees_no_exact_keys_of_fused_parts_and_no_pattern_that_matches_a_part_of_the_name(base: Path) -> None:
    """Without a block list it takes the head's fused layers for packed; a pattern for the whole name helps."""
    config = quantization_config()
    del config["block_name_to_quantize"]
    exact = {f"mtp.layers.0.self_attn.{p}_proj": FULL for p in "qkvo"} | {"mtp.fc": FULL}
    exact |= {f"mtp.layers.0.mlp.{p}_proj": FULL for p in ("gate", "up", "down")}
    checkpoint = packed(base, {**config, "extra_config": NARROW | exact | {".*visual.*": FULL}})
    assert verdicts(checkpoint)["vllm"]["mtp"] is True
    assert "otherwise (no block_name_to_quantize" in verdicts(checkpoint)["sglang"]["reason"]
    for pattern, drafts in (("mtp.*", True), (r"layers\.0\..*", False)):
        extra = NARROW | exact | {".*visual.*": FULL, pattern: FULL}
        changed = {**checkpoint.config, "quantization_config": {**config, "extra_config": extra}}
        engines = verdicts(replace(checkpoint, config=changed))
        assert engines["sglang"]["mtp"] is drafts


def test_what_the_config_says_of_the_body_must_fit_its_tensors(base: Path) -> None:
    wrong = verdicts(packed(base, quantization_config(group_size=64)))["vllm"]
    assert wrong["loads"] is False and "scales has shape" in wrong["reason"] and "group_size=64" in wrong["reason"]


def test_without_a_block_list_every_plain_layer_is_one_too_many(base: Path) -> None:
    open_config = quantization_config()
    del open_config["block_name_to_quantize"]
    verdict = verdicts(packed(base, open_config))["vllm"]
    assert verdict["loads"] is False and "no block_name_to_quantize" in verdict["reason"]


def test_packed_tensors_without_a_config_load_nowhere(base: Path) -> None:
    engines = verdicts(packed(base, None))
    assert not any(verdict["loads"] for verdict in engines.values())
    assert "no quantization_config" in engines["vllm"]["reason"]


def test_a_head_of_another_size_than_its_count_does_not_draft(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    (base / "config.json").write_text(json.dumps(config))
    verdict = verdicts(Checkpoint.open(base))["vllm"]
    assert verdict["loads"] is True and verdict["mtp"] is False and "promises 0 MTP layers" in verdict["reason"]


def test_an_incomplete_head_does_not_draft(base: Path) -> None:
    tensors = {n: raw for n, raw in all_tensors(base).items() if not n.startswith("mtp.layers.0.mlp.up")}
    write_checkpoint(
        base, {"model-00001-of-00002.safetensors": tensors}, json.loads((base / "config.json").read_text())
    )
    (base / "model-00002-of-00002.safetensors").unlink()
    for engine in ("vllm", "sglang"):
        verdict = verdicts(Checkpoint.open(base))[engine]
        assert verdict["mtp"] is False and "mtp.layers.0.mlp.up_proj is missing" in verdict["reason"]


def test_a_dynamic_rule_against_mtp_makes_the_whole_head_plain_but_its_fc(base: Path) -> None:
    """The shortcut of qwen3_5_mtp.py: also where the rule's pattern would not match a single layer."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    config["dynamic"] = {"-:nothing_like_mtp": {}}
    verdict = verdicts(packed(base, config, ("mtp.layers.0.mlp.down_proj",)))["vllm"]
    assert verdict["mtp"] is False and "dynamic leaves mtp out" in verdict["reason"]


def test_a_hostile_pattern_is_told_and_holds_up_nothing(base: Path) -> None:
    checkpoint = packed(base, quantization_config(extra_config={ENDLESS: FULL, "(.*)*X": FULL}))
    with watching():
        verdict = verdicts(checkpoint)["vllm"]
    assert verdict["loads"] is False and "does not end in sensible time" in verdict["reason"]
    assert Judgement.of(checkpoint).hostile == [ENDLESS, "(.*)*X"]


@pytest.mark.parametrize("quantization", [
    5, [], "int4", {"quant_method": None}, {"quant_method": "gptq"}, {"quant_method": "awq", "bits": {}},
    {"quant_method": "compressed-tensors", "config_groups": {"": {"targets": [5]}}}, {"quant_method": "fp8"},
    {"quant_method": "fp8", "activation_scheme": [], "ignored_layers": 5}, {"quant_method": "gptq", "dynamic": {"": 5}},
    auto_round(extra_config={"": FULL}), auto_round(bits=True), auto_round(group_size=0),
    auto_round(dynamic=5), auto_round(dynamic=[None]),
], ids=repr)  # fmt: skip
def test_nonsense_in_a_config_gives_a_reason_and_never_a_traceback(quantization: Any, base: Path) -> None:
    for verdict in verdicts(packed(base, quantization, ("mtp.fc",))).values():
        assert set(verdict) == {"loads", "mtp", "reason"} and verdict["reason"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 130) | st.floats() | st.sampled_from(["", "mtp", "(?R)", "re:(", "4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "mtp.fc", ".*", "bits"]), inner),
    max_leaves=6,
)
FIELDS = (
    "bits", "w_bit", "group_size", "sym", "packing_format", "backend", "data_type", "extra_config", "desc_act",
    "block_name_to_quantize", "dynamic", "modules_in_block_to_quantize", "lm_head", "zero_point",
    "modules_to_not_convert", "config_groups", "ignore", "format", "sparsity_config", "activation_scheme",
    "ignored_layers", "weight_block_size",
)  # fmt: skip
SOUND: dict[str, Changes] = {
    "auto-round": auto_round(),
    "gptq": gptq(),
    "awq": awq(),
    "compressed-tensors": compressed([]),
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = pico_base(tmp_path_factory.mktemp("quantized") / "base")
    return packed(folder, quantization_config(), ("mtp.layers.0.mlp.down_proj",))


@given(method=st.sampled_from(sorted(SOUND)), changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_json_in_any_field_gives_verdicts_and_no_traceback(
    quantized: Checkpoint, method: str, changes: Changes
) -> None:
    config = {**quantized.config, "quantization_config": {**SOUND[method], **changes}}
    for verdict in verdicts(replace(quantized, config=config)).values():
        assert verdict["loads"] in (True, False) and verdict["mtp"] in (True, False) and verdict["reason"]


def test_methods_without_rules_here_are_not_judged(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "modelopt"}}))
    assert verdicts(Checkpoint.open(base))["vllm"]["loads"] is True


def test_an_image_model_needs_its_processors_and_a_text_model_none(base: Path) -> None:
    assert missing_vision_files(Checkpoint.open(base)) == []
    (base / "preprocessor_config.json").unlink()
    (base / "video_preprocessor_config.json").unlink()
    both = ["preprocessor_config.json", "video_preprocessor_config.json"]
    assert missing_vision_files(Checkpoint.open(base)) == both
    nested = {"image_processor": {}, "video_processor": {}}
    (base / "processor_config.json").write_text(json.dumps(nested))  # where transformers 5 puts them
    assert missing_vision_files(Checkpoint.open(base)) == []
    (base / "processor_config.json").write_text("[")
    assert missing_vision_files(Checkpoint.open(base)) == both
    config = json.loads((base / "config.json").read_text())
    del config["vision_config"]
    (base / "config.json").write_text(json.dumps(config))
    assert missing_vision_files(Checkpoint.open(base)) == []


# Sizes


def shape(layers: int, experts: int, packed_body: bool) -> dict[str, Tensor]:
    """Tensors of a large model, by name only."""
    found: dict[str, Tensor] = {}

    def put(module: str, inputs: int = 4096, outputs: int = 4096) -> None:
        if packed_body and module.startswith(BODY):
            parts = {"qweight": ("I32", (inputs // 8, outputs)), "scales": ("F16", (inputs // 128, outputs)),
                     "qzeros": ("I32", (inputs // 128, outputs // 8))}  # fmt: skip
        else:
            parts = {"weight": ("BF16", (outputs, inputs))}
        for part, (dtype, sides) in parts.items():
            found[f"{module}.{part}"] = Tensor(f"{module}.{part}", dtype, sides, Path("x"), 0, 0)

    for layer in [*(f"{BODY}.{n}" for n in range(layers)), "mtp.layers.0"]:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            put(f"{layer}.self_attn.{name}")
        for expert in [f"mlp.experts.{n}" for n in range(experts)] or ["mlp"]:
            for name in ("gate_proj", "up_proj", "down_proj"):
                put(f"{layer}.{expert}.{name}")
    for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        put(f"mtp.{name}")
    return found


def large(folder: Path, layers: int, experts: int, entries: int) -> Checkpoint:
    """A checkpoint of this size, with so many entries in its config's list of exceptions."""
    names = [f"{BODY}.{n}.linear_attn.in_proj_{p}" for n in range(entries // 2) for p in "ab"]
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": {"mtp_num_hidden_layers": 1, "num_hidden_layers": layers},
        "quantization_config": auto_round(
            block_name_to_quantize=BODY, extra_config=dict.fromkeys(names, FULL) | {".*mtp.*": FULL}
        ),
    }
    return Checkpoint(folder, config, shape(layers, experts, True), (), None)


@pytest.mark.parametrize(
    ("layers", "experts"), [(64, 0), pytest.param(60, 512, marks=pytest.mark.slow)], ids=["27 B", "MoE"]
)
def test_a_large_model_is_judged(layers: int, experts: int, tmp_path: Path) -> None:
    checkpoint = large(tmp_path, layers, experts, 192)
    assert len(checkpoint.modules) > 400
    assert verdicts(checkpoint)["vllm"] == {"loads": True, "mtp": True, "reason": "nothing is in the way"}


def test_the_work_for_verdicts_grows_as_the_model_does_and_not_faster(tmp_path: Path) -> None:
    """Of twice the layers, experts or exceptions a rule that compares each with each makes four times the work."""
    small = {"layers": 4, "experts": 16, "entries": 64}

    def work(**changes: int) -> int:
        checkpoint = large(tmp_path, **(small | changes))
        return calls(lambda: verdicts(checkpoint))

    once = work()
    assert once > 1000
    assert work(layers=8, entries=128) < 2.5 * once and work(experts=32) < 2.5 * once
