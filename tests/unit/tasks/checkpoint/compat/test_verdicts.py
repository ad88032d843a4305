"""What each engine will do with whole checkpoints, of whatever config, and how much work it is to say so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement, missing_vision_files
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.document import EngineVerdict
from requant.tasks.checkpoint.header import Tensor
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
from tests.factories.quantization_configs import ENDLESS, SOUND, Changes, auto_round
from tests.factories.watching import watching

BODY = "model.language_model.layers"


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
    fine = EngineVerdict(loads=True, mtp=True, reason="nothing is in the way", version="0.32.0")
    ignored = fine.model_copy(update={"mtp": False, "reason": "transformers ignores the MTP head", "version": "5.23.0"})
    in_sglang = fine.model_copy(update={"version": "0.5.23"})
    assert Judgement.of(checkpoint).verdicts == {"vllm": fine, "sglang": in_sglang, "transformers": ignored}
    assert Judgement.of(checkpoint).draft_problem is None


def test_a_packed_fc_drafts_in_vllm_if_the_config_says_so_and_never_in_sglang(base: Path) -> None:
    silent = Judgement.of(packed(base, quantization_config(), ("mtp.fc",))).verdicts
    assert silent["vllm"].mtp is False and "mtp.fc.qweight is packed" in silent["vllm"].reason
    assert "block_name_to_quantize" in silent["vllm"].reason


def test_a_packed_fc_that_the_config_names_drafts_in_vllm_only(base: Path) -> None:
    fc = {"mtp.fc": {"bits": 4, "group_size": 32, "sym": True}}
    said = quantization_config(extra_config=NARROW | fc)
    engines = Judgement.of(packed(base, said, ("mtp.fc",))).verdicts
    assert engines["vllm"].mtp is True and engines["sglang"].mtp is False
    assert "mtp.fc.qweight is packed" in engines["sglang"].reason


def test_sglang_sees_no_exact_keys_of_fused_parts_and_no_pattern_that_matches_a_part_of_the_name(base: Path) -> None:
    """Without a block list it takes the head's fused layers for packed; a pattern for the whole name helps."""
    config = quantization_config()
    del config["block_name_to_quantize"]
    exact = {f"mtp.layers.0.self_attn.{p}_proj": FULL for p in "qkvo"} | {"mtp.fc": FULL}
    exact |= {f"mtp.layers.0.mlp.{p}_proj": FULL for p in ("gate", "up", "down")}
    checkpoint = packed(base, {**config, "extra_config": NARROW | exact | {".*visual.*": FULL}})
    assert Judgement.of(checkpoint).verdicts["vllm"].mtp is True
    assert "otherwise (no block_name_to_quantize" in Judgement.of(checkpoint).verdicts["sglang"].reason
    for pattern, drafts in (("mtp.*", True), (r"layers\.0\..*", False)):
        extra = NARROW | exact | {".*visual.*": FULL, pattern: FULL}
        changed = {**checkpoint.config, "quantization_config": {**config, "extra_config": extra}}
        engines = Judgement.of(replace(checkpoint, config=ModelConfig(changed))).verdicts
        assert engines["sglang"].mtp is drafts


def test_what_the_config_says_of_the_body_must_fit_its_tensors(base: Path) -> None:
    wrong = Judgement.of(packed(base, quantization_config(group_size=64))).verdicts["vllm"]
    assert wrong.loads is False and "scales has shape" in wrong.reason and "group_size=64" in wrong.reason


def test_without_a_block_list_every_plain_layer_is_one_too_many(base: Path) -> None:
    open_config = quantization_config()
    del open_config["block_name_to_quantize"]
    verdict = Judgement.of(packed(base, open_config)).verdicts["vllm"]
    assert verdict.loads is False and "no block_name_to_quantize" in verdict.reason


def test_packed_tensors_without_a_config_load_nowhere(base: Path) -> None:
    engines = Judgement.of(packed(base, None)).verdicts
    assert not any(verdict.loads for verdict in engines.values())
    assert "no quantization_config" in engines["vllm"].reason


def test_a_head_of_another_size_than_its_count_does_not_draft(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    (base / "config.json").write_text(json.dumps(config))
    verdict = Judgement.of(Checkpoint.open(base)).verdicts["vllm"]
    assert verdict.loads is True and verdict.mtp is False and "promises 0 MTP layers" in verdict.reason


def test_an_incomplete_head_does_not_draft(base: Path) -> None:
    tensors = {n: raw for n, raw in all_tensors(base).items() if not n.startswith("mtp.layers.0.mlp.up")}
    write_checkpoint(
        base, {"model-00001-of-00002.safetensors": tensors}, json.loads((base / "config.json").read_text())
    )
    (base / "model-00002-of-00002.safetensors").unlink()
    for engine in ("vllm", "sglang"):
        verdict = Judgement.of(Checkpoint.open(base)).verdicts[engine]
        assert verdict.mtp is False and "mtp.layers.0.mlp.up_proj is missing" in verdict.reason


def test_a_dynamic_rule_against_mtp_makes_the_whole_head_plain_but_its_fc(base: Path) -> None:
    """The shortcut of qwen3_5_mtp.py: also where the rule's pattern would not match a single layer."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    config["dynamic"] = {"-:nothing_like_mtp": {}}
    verdict = Judgement.of(packed(base, config, ("mtp.layers.0.mlp.down_proj",))).verdicts["vllm"]
    assert verdict.mtp is False and "dynamic leaves mtp out" in verdict.reason


def test_a_hostile_pattern_is_told_and_holds_up_nothing(base: Path) -> None:
    checkpoint = packed(base, quantization_config(extra_config={ENDLESS: FULL, "(.*)*X": FULL}))
    with watching():
        verdict = Judgement.of(checkpoint).verdicts["vllm"]
    assert verdict.loads is False and "does not end in sensible time" in verdict.reason
    assert Judgement.of(checkpoint).hostile == [ENDLESS, "(.*)*X"]


@pytest.mark.parametrize("quantization", [
    5, [], "int4", {"quant_method": None}, {"quant_method": "gptq"}, {"quant_method": "awq", "bits": {}},
    {"quant_method": "compressed-tensors", "config_groups": {"": {"targets": [5]}}}, {"quant_method": "fp8"},
    {"quant_method": "fp8", "activation_scheme": [], "ignored_layers": 5}, {"quant_method": "gptq", "dynamic": {"": 5}},
    auto_round(extra_config={"": FULL}), auto_round(bits=True), auto_round(group_size=0),
    auto_round(dynamic=5), auto_round(dynamic=[None]),
], ids=repr)  # fmt: skip
def test_nonsense_in_a_config_gives_a_reason_and_never_a_traceback(quantization: Any, base: Path) -> None:
    for verdict in Judgement.of(packed(base, quantization, ("mtp.fc",))).verdicts.values():
        assert set(verdict.to_json()) == {"loads", "mtp", "reason", "version"} and verdict.reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 130) | st.floats() | st.sampled_from(["", "mtp", "(?R)", "re:(", "4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "mtp.fc", ".*", "bits"]), inner),
    max_leaves=6,
)
FIELDS = (
    "bits", "w_bit", "group_size", "sym", "packing_format", "backend", "data_type", "extra_config", "desc_act",
    "block_name_to_quantize", "dynamic", "modules_in_block_to_quantize", "lm_head", "zero_point",
    "modules_to_not_convert", "config_groups", "ignore", "format", "sparsity_config", "activation_scheme",
    "ignored_layers", "weight_block_size", "quant_method", "quant_algo", "quantization", "quantized_layers", "producer",
    "export", "exclude",
)  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = pico_base(tmp_path_factory.mktemp("quantized") / "base")
    return packed(folder, quantization_config(), ("mtp.layers.0.mlp.down_proj",))


@given(method=st.sampled_from(sorted(SOUND)), changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_json_in_any_field_gives_verdicts_and_no_traceback(
    quantized: Checkpoint, method: str, changes: Changes
) -> None:
    config = {**quantized.config, "quantization_config": {**SOUND[method], **changes}}
    for verdict in Judgement.of(replace(quantized, config=ModelConfig(config))).verdicts.values():
        assert verdict.loads in (True, False, None) and verdict.mtp in (True, False, None) and verdict.reason


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


def test_a_family_whose_repos_have_no_settings_for_videos_lacks_none(base: Path) -> None:
    (base / "video_preprocessor_config.json").unlink()
    assert missing_vision_files(Checkpoint.open(base)) == ["video_preprocessor_config.json"]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_5_vl"}))
    assert missing_vision_files(Checkpoint.open(base)) == []
    (base / "preprocessor_config.json").unlink()
    assert len(missing_vision_files(Checkpoint.open(base))) == 2


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
    return Checkpoint(folder, ModelConfig(config), shape(layers, experts, True), (), None)


@pytest.mark.parametrize(
    ("layers", "experts"), [(64, 0), pytest.param(60, 512, marks=pytest.mark.slow)], ids=["27 B", "MoE"]
)
def test_a_large_model_is_judged(layers: int, experts: int, tmp_path: Path) -> None:
    checkpoint = large(tmp_path, layers, experts, 192)
    assert len(checkpoint.modules) > 400
    assert Judgement.of(checkpoint).verdicts["vllm"].to_json() == {
        "loads": True,
        "mtp": True,
        "reason": "nothing is in the way",
        "version": "0.32.0",
    }


def test_the_work_for_verdicts_grows_as_the_model_does_and_not_faster(tmp_path: Path) -> None:
    """Of twice the layers, experts or exceptions a rule that compares each with each makes four times the work."""
    small = {"layers": 4, "experts": 16, "entries": 256}

    def work(**changes: int) -> int:
        checkpoint = large(tmp_path, **(small | changes))
        return calls(lambda: Judgement.of(checkpoint).verdicts)

    once = work()
    assert once > 1000
    assert work(layers=8, entries=512) < 2.5 * once and work(experts=32) < 2.5 * once


def test_no_engine_is_said_to_ignore_a_head_that_is_not_there(tmp_path: Path) -> None:
    shard = {"model.norm.weight": ("BF16", (2,), bytes(4))}
    folder = write_checkpoint(tmp_path / "dense", {"model.safetensors": shard}, {"model_type": "llama"})
    verdicts = Judgement.of(Checkpoint.open(folder)).verdicts
    assert {verdict.reason for verdict in verdicts.values()} == {"there is no MTP head"}
