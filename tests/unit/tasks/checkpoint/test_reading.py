"""How each module is stored: one reading of config and tensors, which all that ask agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from requant.tasks.checkpoint.audit import account
from requant.tasks.checkpoint.compat import Judgement, vllm
from requant.tasks.checkpoint.compat.rule import Patterns
from requant.tasks.checkpoint.config import ModelConfig, QuantizationConfig
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.inventory import storage_of
from requant.tasks.checkpoint.modules import Module, modules_of
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.checkpoint.problems import problems_of
from requant.tasks.checkpoint.reading import Reading
from requant.tasks.checkpoint.weight_error import fidelity
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import FULL
from tests.factories.dequantized import dequantize
from tests.factories.mixed_bits import Mixed, checkpoint_of, mixed, tensors_of
from tests.factories.quantization_configs import Changes, auto_round, awq, compressed, gptq

Q, GATE, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}

SCHEMES: dict[str, tuple[dict[str, Any], PackingScheme]] = {
    "auto-round's default": (AUTO_ROUND, PackingScheme(4, 32, "gptq")),
    "auto_gptq": ({**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}, PackingScheme(4, 32, "gptq")),
    "auto_round plain": ({**AUTO_ROUND, "packing_format": "auto_round"}, PackingScheme(4, 32, "gptq_v2")),
    "gptqmodel": ({**AUTO_ROUND, "packing_format": "auto_round:gptqmodel"}, PackingScheme(4, 32, "gptq_v2")),
    "auto_awq": ({**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}, PackingScheme(4, 32, "awq")),
    "gptq": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, PackingScheme(8, -1, "gptq")),
    "gptq v1": (
        {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 128},
        PackingScheme(4, 128),
    ),
    "gptq v2": (
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 128},
        PackingScheme(4, 128, "gptq_v2"),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, PackingScheme(4, 128, "awq")),
    "bits of its own": ({**AUTO_ROUND, "extra_config": {"m": {"bits": 8}}}, PackingScheme(8, 32, "gptq")),
    "a group size of its own": (
        {**AUTO_ROUND, "extra_config": {"m": {"group_size": -1}}},
        PackingScheme(4, -1, "gptq"),
    ),
    "bits of another": ({**AUTO_ROUND, "extra_config": {"n": {"bits": 8}}}, PackingScheme(4, 32, "gptq")),
}


@pytest.mark.parametrize(("config", "expected"), SCHEMES.values(), ids=SCHEMES)
def test_the_scheme_of_a_module_comes_from_the_config(config: dict[str, Any], expected: PackingScheme) -> None:
    assert Reading(QuantizationConfig(config)).planned("m") == expected


HOSTILE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no bits": {"quant_method": "gptq", "group_size": 32},
    "no group size": {"quant_method": "gptq", "bits": 4},
    "five bits": {**AUTO_ROUND, "bits": 5},
    "sixteen bits": {**AUTO_ROUND, "bits": 16},
    "text bits": {**AUTO_ROUND, "bits": "4"},
    "bits as a list": {**AUTO_ROUND, "bits": [4]},
    "an empty group": {**AUTO_ROUND, "group_size": 0},
    "a negative group": {**AUTO_ROUND, "group_size": -2},
    "a method of another kind": {**AUTO_ROUND, "quant_method": "bitsandbytes"},
    "an unknown packing": {**AUTO_ROUND, "packing_format": "auto_round:marlin"},
    "awq of eight bits": {"quant_method": "awq", "bits": 8, "group_size": 128},
    "an extra config that is text": {**AUTO_ROUND, "extra_config": "m"},
    "an entry that is text": {**AUTO_ROUND, "extra_config": {"m": "fp16"}},
}


@pytest.mark.parametrize("config", HOSTILE.values(), ids=HOSTILE)
def test_a_config_that_makes_no_sense_is_a_checkpoint_error(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        Reading(QuantizationConfig(config)).planned("m")


# What a config says of a module, in the words of each method: (bits, group size), or the field that leaves it out.
STATED: dict[str, tuple[Changes, str, Any]] = {
    "gptq by a pattern": (gptq(dynamic={r"+:.*self_attn.*": {"bits": 8, "group_size": 64}}), Q, (8, 64)),
    "gptq without a sign": (gptq(dynamic={r".*q_proj": {"bits": 8}}), Q, (8, 128)),
    "gptq by the first pattern": (gptq(dynamic={r".*proj": {"group_size": 64}, r".*q_proj": {"bits": 8}}), Q, (4, 64)),
    "gptq by a fused name": (gptq(dynamic={r"+:.*qkv_proj": {"bits": 8}}), Q, (8, 128)),
    "gptq of 3 bits, which vLLM refuses": (gptq(bits=3), Q, (3, 128)),
    "gptq left out": (gptq(dynamic={r"-:.*q_proj": {}}), Q, "dynamic"),
    "gptq's lm_head": (gptq(), "lm_head", "lm_head"),
    "auto-round by an exact name": (auto_round(extra_config={Q: {"bits": 8}}), Q, (8, 128)),
    "auto-round by a group size alone": (auto_round(extra_config={Q: {"group_size": 32}}), Q, (4, 32)),
    "auto-round by a pattern": (auto_round(extra_config={r".*\.\d+\.self_attn\..*": {"bits": 2}}), Q, (2, 128)),
    "auto-round by a fused name": (
        auto_round(extra_config={Q.replace("q_proj", "qkv_proj"): {"bits": 8}}), Q, (8, 128)),
    "auto-round, a name before a pattern": (
        auto_round(extra_config={".*q.*": {"bits": 8}, Q: {"bits": 2}}), Q, (2, 128)),
    "auto-round, one part of a fused layer": (
        auto_round(extra_config={Q.replace("q_proj", "k_proj"): {"bits": 8}}), Q, (4, 128)),
    "auto-round left out by name": (auto_round(extra_config={Q: FULL}), Q, "extra_config"),
    "auto-round left out by its blocks": (auto_round(block_name_to_quantize="model.visual"), Q, "block_name"),
    "auto-round in its blocks": (auto_round(block_name_to_quantize="model.layers"), Q, (4, 128)),
    "awq": (awq(), Q, (4, 128)),
    "awq in old words": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True}, Q, (4, 64)),
    "awq left out": (awq(modules_to_not_convert=["self_attn"]), Q, "modules_to_not_convert"),
    "compressed-tensors": (compressed([]), Q, (4, 128)),
    "compressed-tensors ignored": (compressed(["re:.*q_proj"]), Q, "ignore"),
    "compressed-tensors of an actorder that vLLM refuses": (
        {**compressed([]), "config_groups": {"a": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "group_size": 64, "actorder": "group"}}}}, Q, (4, 64)),
    "fp8 left out": ({"quant_method": "fp8", "modules_to_not_convert": [Q, *(
        Q.replace("q_proj", other) for other in ("k_proj", "v_proj"))]}, Q, "ignored_layers"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "module", "expected"), STATED.values(), ids=STATED)
def test_a_config_is_read_in_the_words_of_its_method(config: Changes, module: str, expected: Any) -> None:
    stated = Reading.of(ModelConfig(), QuantizationConfig(config)).stated(Module(module))
    if isinstance(expected, str):
        assert not stated.quantized and expected in stated.because
    else:
        assert stated.quantized and (stated.bits, stated.group_size) == expected


def test_groups_of_compressed_tensors_have_bits_of_their_own() -> None:
    groups = {
        "a": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "group_size": 64}},
        "b": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}},
    }
    reading = Reading(QuantizationConfig({**compressed([]), "config_groups": groups}))
    packed = {
        Q: {"weight_packed": ("I32", (64, 32)), "weight_scale": ("F16", (64, 2))},
        DOWN: {"weight_packed": ("I32", (64, 16)), "weight_scale": ("F16", (64, 1))},
    }
    modules = [module_of(name, parts) for name, parts in packed.items()]
    assert [storage_of(module, reading) for module in modules] == ["INT8", "INT4"]
    assert [reading.contradiction(module) for module in modules] == [None, None]
    wrong = module_of(DOWN, {"weight_packed": ("I32", (64, 32)), "weight_scale": ("F16", (64, 1))})
    assert f"{DOWN}: its tensors are packed, and quantization_config says 4 bits" in str(reading.contradiction(wrong))


def module_of(name: str, parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> Module:
    return Module(name, {part: Tensor(f"{name}.{part}", d, s, Path("x"), 0, 0) for part, (d, s) in parts.items()})


@pytest.mark.parametrize(("parts", "stored"), [
    ({"weight": ("I8", (64, 64)), "weight_scale": ("F32", (64, 1))}, "INT8"),  # W8A8
    ({"weight": ("F8_E4M3", (64, 64)), "weight_scale": ("F32", (64, 1))}, "F8_E4M3"),
    ({"weight": ("U8", (64, 32)), "weight_scale": ("F8_E4M3", (64, 4)), "weight_scale_2": ("F32", ())}, "FP4"),
    ({"weight": ("U8", (64, 32))}, "U8"),
    ({"qweight": ("I32", (16, 64)), "qzeros": ("I32", (2, 16)), "scales": ("F16", (2, 64))}, "INT8"),
    ({"qweight": ("I32", (8, 64)), "scales": ("F16", (2, 64))}, "packed"),
    ({"qweight": ("I32", (8, 64))}, "packed"),
    ({"weight_packed": ("U8", (64, 32)), "weight_scale": ("F8_E4M3", (64, 4))}, "packed"),
], ids=str)  # fmt: skip
def test_storage_is_named_by_the_tensors_where_they_tell(parts: Any, stored: str) -> None:
    assert storage_of(module_of(Q, parts), Reading(QuantizationConfig())) == stored


@pytest.mark.parametrize("bits", ["\x1b[2J", [4], None, True, 0, -4, 2**70, 4.0], ids=repr)
def test_bits_of_nonsense_are_in_no_name(bits: Any) -> None:
    reading = Reading(QuantizationConfig(auto_round(bits=bits)))
    for parts in ({"qweight": ("I32", (8, 64))}, {"weight_packed": ("I32", (8, 64))}):
        assert storage_of(module_of(Q, parts), reading) == "packed"


def test_a_float_of_four_bits_is_no_integer() -> None:
    weights = {"num_bits": 4, "group_size": 16, "type": "float"}
    config = {**compressed([]), "format": "nvfp4-pack-quantized"}
    config["config_groups"] = {"a": {"targets": ["Linear"], "weights": weights}}
    module = module_of(Q, {"weight_packed": ("U8", (64, 32)), "weight_scale": ("F8_E4M3", (64, 4))})
    assert storage_of(module, Reading(QuantizationConfig(config))) == "FP4"


SEEDS = range(16)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_that_read_a_mixed_config_agree(seed: int, tmp_path: Path) -> None:
    made = mixed(Random(seed), tmp_path)
    checkpoint = made.quantized
    for name, scheme in made.schemes.items():
        module = checkpoint.modules[name]
        assert storage_of(module, checkpoint.reading) == ("BF16" if scheme is None else f"INT{scheme.bits}")
        if scheme is None:
            continue
        read = checkpoint.reading.scheme(module)
        assert read.bits == scheme.bits and read.packing == scheme.packing
        np.testing.assert_array_equal(dequantize(module.packed_parts, read), dequantize(module.packed_parts, scheme))
    packed = [name for name, scheme in made.schemes.items() if scheme]
    audit = account(checkpoint, made.base, with_head=False)
    assert audit.unaccounted == ([] if packed else ["no tensor is quantized"])
    assert (audit.packed, audit.altered) == (len(packed), [])
    compared = fidelity(checkpoint, made.base)
    assert [matrix.name.removesuffix(".weight") for matrix in compared] == packed
    assert all(matrix.error < 0.2 and abs(matrix.offset) < 0.1 for matrix in compared)
    assert not any(checkpoint.reading.contradiction(checkpoint.modules[name]) for name in packed)


def test_what_vllm_accepts_is_read_as_vllm_reads_it(tmp_path: Path) -> None:
    accepted = Counter[bool]()
    for seed in SEEDS:
        made = mixed(Random(seed), tmp_path)
        checkpoint = made.quantized
        accepted[loads := bool(Judgement.of(checkpoint).verdicts["vllm"].loads)] += 1
        if not loads:
            continue
        tree = vllm.architecture_of(checkpoint.config).tree
        rule = vllm.read_rule(checkpoint.quantization, tree.renames, tree.fused, Patterns(), checkpoint)
        for layer in tree.layers(checkpoint.modules.values()):
            theirs = rule.scheme(layer) if rule else None
            for part in layer.parts:
                ours = made.schemes[part] and checkpoint.reading.scheme(checkpoint.modules[part])
                assert theirs and theirs.quantized == (ours is not None)
                assert ours is None or (ours.bits, ours.group_size) == (theirs.bits, theirs.group_size)
    assert min(accepted[True], accepted[False]) > 2, accepted


def test_what_all_modules_share_is_told_and_nothing_where_they_differ(tmp_path: Path) -> None:
    weight = np.zeros((64, 64), np.float32)
    schemes = {"a": PackingScheme(4, 32), "b": PackingScheme(8, 32), "c": PackingScheme(8, 64)}
    modules = {name: modules_of(tensors_of(name, weight, scheme))[name] for name, scheme in schemes.items()}
    reading = Reading(QuantizationConfig(auto_round(group_size=32)))
    for names, expected in (("a", (4, 32)), ("b", (8, 32)), ("ab", (None, 32)), ("bc", (8, None)), ("", (4, 32))):
        shared = reading.shared(modules[name] for name in names)
        assert (shared.bits, shared.group_size, shared.sym) == (*expected, True)


def plain_model(tmp_path: Path, config: Any, bits: int = 4) -> Mixed:
    """Two layers of one packed module each."""
    names = [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]
    schemes: dict[str, PackingScheme | None] = dict.fromkeys(names, PackingScheme(bits, 32))
    weight = np.random.default_rng(0).normal(0, 0.05, (64, 64)).astype(np.float32)
    packed = [t for name in names for t in tensors_of(name, weight, schemes[name])]
    plain = [t for name in names for t in tensors_of(name, weight, None)]
    return Mixed(
        checkpoint_of(tmp_path, "LlamaForCausalLM", config, packed),
        checkpoint_of(tmp_path, "LlamaForCausalLM", None, plain),
        schemes,
    )


@pytest.mark.parametrize(("config", "bits", "said"), [
    (auto_round(group_size=32), 8, "hold 8 bits in groups of 32, and quantization_config says 4 bits in groups of 32"),
    (auto_round(group_size=64), 4, "hold 4 bits in groups of 32, and quantization_config says 4 bits in groups of 64"),
    (gptq(group_size=32, dynamic={"+:.*down": {"bits": 8}}), 4, "says 8 bits in groups of 32 (dynamic['+:.*down'])"),
    (gptq(group_size=32, dynamic={"-:.*down": {}}), 4, "says that the module is not quantized (dynamic['-:.*down'])"),
    (awq(group_size=32), 4, "hold 4 bits in groups of 32 in the layout of gptq, and quantization_config says 4 bits"),
    ({"quant_method": "gptq", "group_size": 32}, 4, "cannot be read"),
], ids=str)  # fmt: skip
def test_a_config_that_contradicts_the_tensors_is_told_once_with_both(
    config: Changes, bits: int, said: str, tmp_path: Path
) -> None:
    made = plain_model(tmp_path, config, bits)
    problems = problems_of(made.quantized, Judgement.of(made.quantized))
    (problem,) = [p for p in problems if "down_proj: its tensors" in p]
    assert said in problem and problem.endswith("(and so for 1 more modules)") and DOWN in problem
    assert len(account(made.quantized, made.base, with_head=False).unaccounted) == 2
    for name, scheme in made.schemes.items():  # the tensors are read as what they are
        module = made.quantized.modules[name]
        assert storage_of(module, made.quantized.reading) == f"INT{bits}"
        assert scheme and made.quantized.reading.scheme(module) == scheme
