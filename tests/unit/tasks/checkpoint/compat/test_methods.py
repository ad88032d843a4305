"""Checkpoints of every quantization method are named, and judged no further than is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import VERSIONS, Judgement, sglang, transformers, vllm
from requant.tasks.checkpoint.inspect import as_text, inspect_checkpoint
from requant.tasks.checkpoint.methods import BY_STATED, METHODS
from tests.factories.checkpoints import write_checkpoint
from tests.factories.quantization_configs import modelopt

HIDDEN, VOCABULARY = 32, 64
WORDS = ("remove it", "remove one", "has no scale beside it", "is missing beside", "restore it")
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U32": 4, "U8": 1, "I8": 1, "I16": 2, "I64": 8, "F8_E4M3": 1}
HEAD = {
    "mtp.fc": (HIDDEN, 2 * HIDDEN),
    **{f"mtp.layers.0.self_attn.{name}": (HIDDEN, HIDDEN) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mtp.layers.0.{name}": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")},
    **{f"mtp.{name}": (HIDDEN,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")},
}


class Brought(NamedTuple):
    """What people bring: a config, the parts of a quantized matrix, and answers of (vLLM, SGLang, transformers)."""

    quantization: dict[str, Any] | None
    parts: dict[str, tuple[str, tuple[int, ...]]]
    name: str
    loads: tuple[bool | None, bool | None, bool | None]
    config: dict[str, Any] = {}  # noqa: RUF012 - a default that nobody changes
    file: dict[str, Any] | None = None


NVFP4 = {".weight": ("U8", (HIDDEN, 16)), ".weight_scale": ("F8_E4M3", (HIDDEN, 2)), ".weight_scale_2": ("F32", (1,))}
FP8 = {".weight": ("F8_E4M3", (HIDDEN, HIDDEN)), ".weight_scale": ("F32", (1,)), ".input_scale": ("F32", (1,))}
INT8 = {".weight": ("I8", (HIDDEN, HIDDEN))}
MLX = {".weight": ("U32", (HIDDEN, 4)), ".scales": ("BF16", (HIDDEN, 1)), ".biases": ("BF16", (HIDDEN, 1))}
OWN_FILE = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {
        "quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "mtp*"],
    },
}  # fmt: skip
PLAIN_HEAD = modelopt(ignore=["lm_head", "mtp*"])
MIXED = {
    f"model.layers.{layer}.self_attn.{name}": {"quant_algo": "NVFP4"}
    for layer in (0, 1)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj")
}
QUARK = {"quant_method": "quark", "export": {"kv_cache_group": []}, "exclude": ["lm_head", "re:mtp.*"]}
BNB4 = {".weight": ("U8", (512, 1)), ".weight.absmax": ("F32", (16,)), ".weight.quant_map": ("F32", (16,)),
        ".weight.quant_state.bitsandbytes__nf4": ("U8", (80,))}  # fmt: skip
MXFP4 = {".weight_packed": ("U8", (HIDDEN, 16)), ".weight_scale": ("U8", (HIDDEN, 1))}


def packed_floats(form: str, group_size: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "group_size": group_size, "symmetric": True, "type": "float", "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    ignore = ["lm_head", "re:mtp.*"]
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ignore}


BROUGHT = {
    "ModelOpt": Brought(PLAIN_HEAD, NVFP4, "ModelOpt NVFP4", (True, None, False)),
    "ModelOpt, FP8": Brought({**PLAIN_HEAD, "quant_algo": "FP8"}, FP8, "ModelOpt FP8", (True, None, False)),
    "ModelOpt, mixed": Brought(
        {**PLAIN_HEAD, "quant_algo": "MIXED_PRECISION", "quantized_layers": MIXED}, NVFP4,
        "ModelOpt MIXED_PRECISION", (True, None, False),
    ),
    "ModelOpt, own file": Brought(None, NVFP4, "ModelOpt NVFP4", (True, None, False), file=OWN_FILE),
    "Quark": Brought(QUARK, FP8, "Quark", (None, None, None)),
    "MXFP8": Brought({"quant_method": "mxfp8", "ignored_layers": ["lm_head", "mtp"]}, FP8, "MXFP8", (True, None, None)),
    "bitsandbytes": Brought(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, BNB4,
        "bitsandbytes NF4", (False, None, None),
    ),
    "bitsandbytes, 8 bits": Brought(
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
        {**INT8, ".SCB": ("F32", (HIDDEN,))}, "bitsandbytes", (False, None, None),
    ),
    "MXFP4": Brought(
        {"quant_method": "mxfp4"}, {"_blocks": ("U8", (2, HIDDEN, 1, 16)), "_scales": ("U8", (2, HIDDEN, 1))}, "MXFP4",
        (None, None, None),
    ),
    "MLX": Brought({"bits": 4, "group_size": 32}, MLX, "MLX", (False, False, False)),
    "MLX, the other key": Brought(
        None, MLX, "MLX", (False, False, False), {"quantization": {"bits": 4, "group_size": 32}}
    ),
    "torchao": Brought(
        {"quant_method": "torchao"}, {"._weight_qdata": ("I8", (HIDDEN, HIDDEN)), "._weight_scale": ("F32", (HIDDEN,))},
        "torchao", (None, False, None),
    ),
    "HQQ": Brought(
        {"quant_method": "hqq"}, {".W_q": ("U8", (512, 1)), ".scale": ("BF16", (16,)), ".zero": ("BF16", (16,))}, "HQQ",
        (False, False, None),
    ),
    "EETQ": Brought({"quant_method": "eetq"}, {**INT8, ".weight_scales": ("F16", (HIDDEN,))}, "EETQ",
                    (False, False, None)),
    "AQLM": Brought(
        {"quant_method": "aqlm"}, {".codes": ("I16", (HIDDEN, 4, 1)), ".codebooks": ("BF16", (1, 16, 1, 8)),
                                   ".scales": ("BF16", (HIDDEN, 1, 1, 1))}, "AQLM", (False, False, None),
    ),
    "VPTQ": Brought(
        {"quant_method": "vptq"}, {".indices": ("I32", (1, 4, 4)), ".centroids.weight": ("BF16", (1, 64))}, "VPTQ",
        (False, False, None),
    ),
    "SpQR": Brought(
        {"quant_method": "spqr"}, {".dense_weights": ("I64", (16,)), ".row_offsets": ("I32", (33,))}, "SpQR",
        (False, False, None),
    ),
    "QuIP#": Brought(
        {"quant_method": "quip"}, {".Qidxs": ("I64", (HIDDEN, 4)), ".SU": ("F16", (HIDDEN,))}, "QuIP#",
        (False, False, False),
    ),
    "EXL2": Brought(
        {"quant_method": "exl2"}, {".q_weight": ("I32", (8, HIDDEN)), ".q_scale": ("I32", (1, 4))}, "EXL2",
        (False, False, False),
    ),
    "EXL3": Brought(
        {"quant_method": "exl3"}, {".trellis": ("I16", (2, 2, 64)), ".suh": ("F16", (HIDDEN,))}, "EXL3",
        (False, False, False),
    ),
    "GGUF": Brought({"quant_method": "gguf"}, INT8, "GGUF", (False, None, None)),
    "FBGEMM": Brought({"quant_method": "fbgemm_fp8"}, FP8, "FBGEMM FP8", (False, False, None)),
    "experts_int8": Brought({"quant_method": "experts_int8"}, {".weight": ("BF16", (HIDDEN, HIDDEN))}, "experts_int8",
                            (None, False, False)),
    "moe_wna16": Brought({"quant_method": "moe_wna16"}, INT8, "moe_wna16", (None, None, False)),
    "online": Brought({"quant_method": "online"}, {".weight": ("BF16", (HIDDEN, HIDDEN))}, "quantized at load",
                      (None, False, False)),
    "DeepSeek V4": Brought(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        {".weight": ("F8_E4M3", (HIDDEN, HIDDEN)), ".scale": ("U8", (1, 1))}, "FP8", (None, None, True),
        {"model_type": "deepseek_v4"},
    ),
    "NVFP4 as compressed-tensors": Brought(
        packed_floats("nvfp4-pack-quantized", 16),
        {".weight_packed": ("U8", (HIDDEN, 16)), ".weight_scale": ("F8_E4M3", (HIDDEN, 2)),
         ".weight_global_scale": ("F32", (1,))}, "compressed-tensors", (True, True, True),
    ),
    "MXFP4 as compressed-tensors": Brought(
        packed_floats("mxfp4-pack-quantized", 32), MXFP4, "compressed-tensors", (True, True, True),
    ),
    "MXFP4 of auto-round": Brought(
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp",
         "block_name_to_quantize": "model.layers"}, MXFP4, "auto-round", (True, False, True),
    ),
    "a KV cache alone": Brought(
        None, {".weight": ("BF16", (HIDDEN, HIDDEN))}, "ModelOpt", (True, None, True),
        file={"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}},
    ),
    "of nobody's": Brought({"quant_method": "my-own"}, {".codes": ("I32", (4, 4)), ".weight": ("I8", (8, 8))}, "my-own",
                           (False, False, False)),
}  # fmt: skip


def zeros(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], bytes]:
    size = SIZES[dtype]
    for side in shape:
        size *= side
    return dtype, shape, bytes(size)


def checkpoint_of(folder: Path, brought: Brought, head: bool = True) -> Path:
    """Write a checkpoint of two layers whose attention is stored so, with an MTP head in BF16."""
    tensors: Tensors = {
        "model.embed_tokens.weight": zeros("BF16", (VOCABULARY, HIDDEN)),
        "model.norm.weight": zeros("BF16", (HIDDEN,)),
        "lm_head.weight": zeros("BF16", (VOCABULARY, HIDDEN)),
    }
    for layer in (f"model.layers.{number}" for number in (0, 1)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = zeros("BF16", (HIDDEN,))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors |= {f"{layer}.self_attn.{name}{part}": zeros(*stored) for part, stored in brought.parts.items()}
    tensors |= {f"{name}.weight": zeros("BF16", shape) for name, shape in HEAD.items()} if head else {}
    config: dict[str, Any] = {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY, "num_hidden_layers": 2, "mtp_num_hidden_layers": int(head), "dtype": "bfloat16",
        **brought.config,
    }  # fmt: skip
    if brought.quantization is not None:
        config["quantization_config"] = brought.quantization
    write_checkpoint(folder, {"model-00001-of-00001.safetensors": tensors}, config)
    if brought.file is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(brought.file))
    return folder


@pytest.mark.parametrize("kind", BROUGHT)
def test_a_method_is_named_and_never_taken_for_another(kind: str, tmp_path: Path) -> None:
    brought = BROUGHT[kind]
    document = inspect_checkpoint(checkpoint_of(tmp_path / "x", brought))
    text = as_text("x", document)
    assert document.quantized.name == brought.name and brought.name in text and "INT4" not in text
    assert not any(word in problem for problem in document.problems for word in WORDS), document.problems
    answers = tuple(document.engines[engine].loads for engine in ("vllm", "sglang", "transformers"))
    assert answers == brought.loads, [str(one.reason) for one in document.engines.values()]
    # What neither engine loads is a problem, once; nothing else is wrong with any of them.
    refused = [problem for problem in document.problems if problem.startswith("neither vLLM")]
    assert document.problems == refused and len(refused) == (brought.loads[:2] == (False, False))


@pytest.mark.parametrize("kind", BROUGHT)
def test_every_verdict_says_why_and_whose_rules_it_follows(kind: str, tmp_path: Path) -> None:
    found = Judgement.of(Checkpoint.open(checkpoint_of(tmp_path / "x", BROUGHT[kind]))).verdicts
    for engine, verdict in found.items():
        assert verdict.version == VERSIONS[engine] and f"({engine} {verdict.version})" in verdict.text(engine)
        assert verdict.mtp is not True or verdict.loads is True
        if None in (verdict.loads, verdict.mtp):
            assert "nothing is in the way" not in verdict.reason and "not judged" in verdict.text(engine)


@pytest.mark.parametrize("kind", ["ModelOpt", "ModelOpt, FP8", "ModelOpt, own file", "MXFP8"])
def test_a_plain_head_drafts_in_vllm_if_its_method_leaves_it_out(kind: str, tmp_path: Path) -> None:
    brought = BROUGHT[kind]
    assert Judgement.of(Checkpoint.open(checkpoint_of(tmp_path / "x", brought))).verdicts["vllm"].mtp is True
    text = json.dumps([brought.quantization, brought.file]).replace(', "mtp*"', "").replace(', "mtp"', "")
    quantization, file = json.loads(text)
    silent = brought._replace(quantization=quantization, file=file)
    document = inspect_checkpoint(checkpoint_of(tmp_path / "silent", silent))
    assert document.engines["vllm"].mtp is False and "mtp.fc.weight is not quantized" in document.engines["vllm"].reason
    assert any("mtp.fc.weight is not quantized" in problem for problem in document.problems)


def test_quark_says_no_to_a_plain_head_that_is_not_left_out_and_nothing_of_its_schemes(tmp_path: Path) -> None:
    silent = BROUGHT["Quark"]._replace(quantization={**QUARK, "exclude": ["lm_head"]})
    verdict = Judgement.of(Checkpoint.open(checkpoint_of(tmp_path / "x", silent))).verdicts["vllm"]
    assert verdict.loads is None and verdict.mtp is False and "mtp.fc.weight" in verdict.reason
    assert "which of Quark's schemes" in verdict.reason


@pytest.mark.parametrize("change", [
    {"bits": 3}, {"sym": False}, {"group_size": 16}, {"checkpoint_format": "marlin"}, {"bits": 2}, {"desc_act": None},
], ids=str)  # fmt: skip
def test_sglang_refuses_gptq_that_gptq_marlin_does_not_take(change: dict[str, Any], tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, **change}
    parts = {".qweight": ("I32", (4, HIDDEN)), ".qzeros": ("I32", (1, 4)), ".scales": ("F16", (1, HIDDEN))}
    document = inspect_checkpoint(checkpoint_of(tmp_path / "x", Brought(config, parts, "GPTQ", (None, False, None))))
    assert document.engines["sglang"].loads is False and "SGLang refuses" in document.engines["sglang"].reason
    assert not any("mtp-fix" in problem for problem in document.problems if "refuses" in problem)


@pytest.mark.parametrize(("change", "loads"), [
    ({}, True), ({"sym": False}, False), ({"backend": "gptq"}, False),
    ({"extra_config": {".*o_proj": {"sym": False}}}, False), ({"extra_config": {".*o_proj": {"bits": 3}}}, False),
], ids=str)  # fmt: skip
def test_sglang_has_no_kernel_for_auto_round_that_marlin_does_not_take(
    change: dict[str, Any], loads: bool, tmp_path: Path
) -> None:
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, **change}
    config |= {"block_name_to_quantize": "model.layers"}
    parts = {".qweight": ("I32", (4, HIDDEN)), ".qzeros": ("I32", (1, 4)), ".scales": ("F16", (1, HIDDEN))}
    brought = Brought(config, parts, "auto-round", (None, loads, None))
    verdict = Judgement.of(Checkpoint.open(checkpoint_of(tmp_path / "x", brought))).verdicts["sglang"]
    assert verdict.loads is loads and (loads or "bits=" in verdict.reason)


def test_a_value_of_quant_method_belongs_to_one_method() -> None:
    stated = [value for method in METHODS for value in method.stated]
    assert len(stated) == len(set(stated)) == len(BY_STATED)


def test_every_method_that_an_engine_knows_has_a_name() -> None:
    """A new one in an engine's list gets an entry in the table, or a place among those that no checkpoint declares."""
    at_load = {"int8_per_channel_weight_only", "nvfp4_per_token", "nvfp4_online", "minimax_m3_nvfp4", "mxfp_w4a8"}
    ours = {"fouroversix", "nvfp4", "metal", "gemma"}  # transformers' own
    assert (vllm.METHODS | sglang.METHODS | transformers.METHODS) - set(BY_STATED) == at_load | ours
