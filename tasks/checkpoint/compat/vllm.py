"""vLLM: the quantization configs that it accepts, the names of its layers, and whether an MTP head would draft.

Sources: vLLM 0.32.0 (0.33 the same as far as read): config/model.py (_verify_quantization),
config/speculative.py (hf_config_override), transformers_utils/config.py (get_config: `hf_quant_config.json`),
model_executor/layers/quantization/__init__.py (QuantizationMethods), model_loader/utils.py (configure_quant_config),
model_executor/models/{qwen3_5,qwen3_5_mtp,qwen3_next,qwen3_next_mtp,deepseek_v2,deepseek_mtp,glm4_moe,glm4_moe_mtp}.py.

vLLM builds the draft model with the quantization config object of the main model. Its names are already renamed for the
main model, and if the draft model has a table of fused layers, that replaces the main model's. In a quantized model,
vLLM does not check that every parameter got a tensor: a parameter without one stays uninitialized, without a warning. A
tensor without a parameter is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from requant.tasks.checkpoint.checkpoint import Checkpoint, read_json
from requant.tasks.checkpoint.compat.auto_round import AutoRound
from requant.tasks.checkpoint.compat.compressed import CompressedTensors, Fp8
from requant.tasks.checkpoint.compat.gptq import Awq, Gptq
from requant.tasks.checkpoint.compat.layers import Tree, first_problem
from requant.tasks.checkpoint.compat.modelopt import MIXED, ModelOpt
from requant.tasks.checkpoint.compat.quark import Quark
from requant.tasks.checkpoint.compat.rule import (
    EngineScheme,
    Finding,
    Fused,
    Layer,
    NotJudged,
    NotLoadable,
    Patterns,
    Renames,
    Rule,
    shorten,
)
from requant.tasks.checkpoint.config import JsonObject, ModelConfig, QuantizationConfig
from requant.tasks.checkpoint.methods import (
    AUTO_ROUND_METHODS,
    AWQ_METHODS,
    BY_STATED,
    GPTQ_METHODS,
    MLX,
    MODELOPT_FILE,
    full_name,
)
from requant.tasks.checkpoint.modules import Module

VERSION = "0.32.0"
_QKV: dict[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_GATE_UP: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}
_GDN: dict[str, tuple[str, ...]] = {
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a"),
}  # fmt: skip
_WRAPPED = Renames(
    (
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
    )
)
_TEXT = Renames((("model.language_model.", "model."),))
_ROUTERS = frozenset({"gate", "shared_expert_gate", "conv1d", "embed_tokens", "weights_proj", "wk"})
_CONVERTED = frozenset({"wk"})  # of the indexer: deepseek_v2.py, _try_load_fp8_indexer_wk


@dataclass(frozen=True)
class Architecture:
    """One of vLLM's model classes: the names of its layers, and what differs in its draft model.

    `draft_fused`: the draft model's table of fused layers; None if it uses the main model's.
    `draft_plain`: names (last component) of layers of the draft model that are never quantized.
    `dynamic_shortcut`: the decoder layers of the draft model are not quantized if `dynamic` has a key that starts with
    `-:` and contains `mtp` (qwen3_5_mtp.py).
    """

    tree: Tree
    draft_fused: Fused | None = None
    draft_plain: frozenset[str] = frozenset()
    dynamic_shortcut: bool = False


_DENSE = Tree(Renames(), {**_QKV, **_GATE_UP}, _ROUTERS)
# deepseek_v2.py fuses q_a_proj and kv_a_proj_with_mqa if q_lora_rank is set.
_LATENT = Tree(Renames(), {**_GATE_UP, "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}, _ROUTERS, _CONVERTED)
_VISION = Tree(_WRAPPED, {**_QKV, **_GATE_UP, "qkv": ("qkv",), **_GDN}, _ROUTERS)
_PLAIN_HEAD = frozenset({"eh_proj"})  # nn.Linear in deepseek_mtp.py and glm4_moe_mtp.py
ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        Architecture(_VISION, {**_QKV, **_GATE_UP}, dynamic_shortcut=True),
    ),
    **dict.fromkeys(
        ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
        Architecture(Tree(_TEXT, {**_QKV, **_GATE_UP, **_GDN}, _ROUTERS), {**_QKV, **_GATE_UP}, dynamic_shortcut=True),
    ),
    "Qwen3NextForCausalLM": Architecture(
        Tree(
            Renames(),
            {**_QKV, **_GATE_UP, "in_proj_qkvz": ("in_proj_qkvz",), "in_proj_ba": ("in_proj_ba",)},
            _ROUTERS,
        ),
        {**_QKV, **_GATE_UP},
    ),
    **dict.fromkeys(
        ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "Glm4MoeLiteForCausalLM"),
        Architecture(_LATENT, None, _PLAIN_HEAD),
    ),
    "Glm4MoeForCausalLM": Architecture(_DENSE, None, _PLAIN_HEAD),
}
UNKNOWN_ARCHITECTURE = Architecture(_DENSE, None, _PLAIN_HEAD)

# model_executor/layers/quantization/__init__.py, QuantizationMethods
METHODS = frozenset({
    "awq", "auto_awq", "fp8", "fbgemm_fp8", "fp_quant", "modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed",
    "auto_gptq", "gptq", "gptq_marlin", "awq_marlin", "humming", "compressed-tensors", "experts_int8", "quark",
    "moe_wna16", "torchao", "inc", "mxfp4", "gpt_oss_mxfp4", "deepseek_v4_fp8", "online", "fp8_per_tensor",
    "fp8_per_block", "fp8_per_channel", "int8_per_channel_weight_only", "nvfp4_per_token", "mxfp8",
})  # fmt: skip
DEPRECATED = frozenset({"fbgemm_fp8", "fp_quant"})  # DEPRECATED_QUANTIZATION_METHODS in the same file
RENAMED = frozenset({"auto-round"})  # becomes inc: inc/inc.py, override_quantization_method
# FP8 is another method for them: models/deepseek_v41/quant_config.py, override_quantization_method
DEEPSEEK_V4 = frozenset({"deepseek_v4", "deepseek_v4_text", "deepseek_v41", "deepseek_v41_text"})
SHARED = frozenset({"fp8", "compressed-tensors"})  # SGLang has the same rules, as far as its source was read
MODELOPT = BY_STATED["modelopt"].stated | BY_STATED["mxfp8"].stated


class Unquantized:
    """The rule of a checkpoint without a quantization config."""

    def scheme(self, layer: Layer) -> EngineScheme:
        """Return the scheme of plain weights."""
        return EngineScheme(because="there is no quantization_config")


def architecture(checkpoint: Checkpoint) -> Architecture:
    """Return the model class that vLLM picks."""
    return architecture_of(checkpoint.config)


def architecture_of(config: ModelConfig) -> Architecture:
    """Return the model class that vLLM picks: by the first of the config's `architectures`."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return ARCHITECTURES.get(first, UNKNOWN_ARCHITECTURE) if isinstance(first, str) else UNKNOWN_ARCHITECTURE


def quantization_of(checkpoint: Checkpoint) -> QuantizationConfig | None:
    """Return the quantization config that vLLM finds in config.json, otherwise in ModelOpt's own file; or None.

    The own file is also read for the layers of mixed precision. Raises NotLoadable if a config is not a mapping.
    """
    found = quantization_in(checkpoint.config)
    file = checkpoint.file(MODELOPT_FILE)
    layers_elsewhere = found is not None and found.get("quant_algo") == MIXED and "quantized_layers" not in found
    if (found is None or layers_elsewhere) and file.is_file():
        return QuantizationConfig(read_json(file))
    return found


def quantization_in(config: ModelConfig) -> QuantizationConfig | None:
    """Return the quantization config in config.json, or None. Raises NotLoadable if it is not a mapping."""
    for place in (config, config.text):
        found = place.get("quantization_config", place.get("compression_config"))
        if isinstance(found, dict):
            return QuantizationConfig(found)
        if found is not None:
            raise NotLoadable(f"it is {shorten(found)}, and no mapping")
    return None


def method_of(quantization: QuantizationConfig) -> str:
    """Return `quant_method` as model_arch_config_convertor.py normalizes it.

    Raises NotLoadable if vLLM does not know the method.
    """
    if not isinstance(stated := quantization.get("quant_method", ""), str):
        raise NotLoadable(f"quant_method is {shorten(stated)}")
    method = quantization.method
    if method and method not in METHODS | RENAMED:
        raise NotLoadable(f"quant_method is {shorten(method)}, which vLLM does not know")
    if method in DEPRECATED:
        raise NotLoadable(f"quant_method is {method}, which vLLM takes only with --allow-deprecated-quantization")
    return _of_own_file(quantization) if not stated else method


def _of_own_file(quantization: QuantizationConfig) -> str:
    """Return the method of a config that names ModelOpt as its producer and no method; empty without an algorithm.

    As _normalize_quantization_config of model_arch_config_convertor.py. Raises NotLoadable if that raises.
    """
    algorithm = (quantization.child("quantization") or JsonObject()).get("quant_algo")
    if quantization.method != "modelopt" or algorithm is None:
        return ""
    if str(algorithm).upper() not in {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4"}:
        raise NotLoadable(f"quant_algo is {shorten(algorithm)}, which vLLM does not take from {MODELOPT_FILE}")
    return "modelopt"


def read_rule(
    quantization: QuantizationConfig | None, renames: Renames, fused: Fused, patterns: Patterns, checkpoint: Checkpoint
) -> Rule | None:
    """Return the rule of a config; None if Requant has no rules for its method.

    Raises NotLoadable if vLLM refuses the config.
    """
    if checkpoint.method is MLX:
        raise NotLoadable("it is MLX's, which vLLM does not know")
    method = method_of(quantization) if quantization is not None else ""
    if quantization is None or not method:
        return Unquantized()
    if method in AUTO_ROUND_METHODS:
        return AutoRound.read(quantization, renames, fused, patterns)
    if method in GPTQ_METHODS:
        return Gptq.read(quantization, renames, fused, patterns, checkpoint.tensors.values())
    if method in AWQ_METHODS:
        return Awq.read(quantization, renames, fused, checkpoint.tensors.values())
    if method == "fp8" and checkpoint.config.get("model_type") not in DEEPSEEK_V4:
        return Fp8.read(quantization, renames, fused)
    if method == "compressed-tensors":
        return CompressedTensors.read(quantization, renames, fused, patterns)
    if method in MODELOPT:
        return ModelOpt.read(quantization, renames, fused, patterns)
    return Quark.read(quantization, renames, fused, patterns) if method == "quark" else None


def no_rules(checkpoint: Checkpoint) -> NotJudged:
    """Return the finding on a checkpoint whose method has no rules here."""
    method = checkpoint.method
    return NotJudged(f"Requant has no rules for {full_name(method, checkpoint.quantization) if method else 'it'}")


def load_problem(checkpoint: Checkpoint, modules: Mapping[str, Module], patterns: Patterns) -> Finding:
    """Return why vLLM would not load the main model correctly, or None. `modules`: the modules outside the MTP head."""
    tree = architecture(checkpoint).tree
    try:
        rule = read_rule(quantization_of(checkpoint), tree.renames, tree.fused, patterns, checkpoint)
    except NotLoadable as refusal:
        return f"vLLM refuses quantization_config: {refusal}"
    if rule is None:
        return no_rules(checkpoint)
    layers = tree.layers(modules.values())
    if architecture(checkpoint) is not UNKNOWN_ARCHITECTURE:
        return _first_problem(rule, layers, modules, tree)
    fused = [layer for layer in layers if layer.name.rpartition(".")[2] in tree.fused]
    found = _first_problem(rule, [layer for layer in layers if layer not in fused], modules, tree)
    if found is None and (problem := _first_problem(rule, fused, modules, tree)):
        return NotJudged(f"which layers vLLM fuses for this architecture is not known; fused as Llama's, {problem}")
    return found


def head_problem(checkpoint: Checkpoint, modules: Mapping[str, Module], patterns: Patterns) -> Finding:
    """Return why vLLM would not load the MTP head correctly, or None. `modules`: the modules of the head."""
    known = architecture(checkpoint)
    fused = known.tree.fused if known.draft_fused is None else known.draft_fused
    tree = replace(known.tree, fused=fused, plain=known.tree.plain | known.draft_plain)
    try:
        quantization = quantization_of(checkpoint)
        rule = read_rule(quantization, tree.renames, fused, patterns, checkpoint)
        shortcut = known.dynamic_shortcut and quantization is not None and _mtp_left_out(quantization)
    except NotLoadable as refusal:
        return f"vLLM refuses quantization_config: {refusal}"
    if rule is None:
        return no_rules(checkpoint)
    layers = tree.layers(modules.values())
    if shortcut:
        decoder_layers = [layer for layer in layers if ".layers." in layer.name]
        problem = _first_problem(_LeftOut(), decoder_layers, modules, tree)
        if problem:
            return problem
        layers = [layer for layer in layers if ".layers." not in layer.name]
    return _first_problem(rule, layers, modules, tree)


class _LeftOut:
    def scheme(self, layer: Layer) -> EngineScheme:
        return EngineScheme(because="dynamic leaves mtp out")


def _mtp_left_out(quantization: QuantizationConfig) -> bool:
    dynamic = quantization.get("dynamic", {})
    if not isinstance(dynamic, dict):
        raise NotLoadable(f"dynamic is {shorten(dynamic)}, and no mapping")
    return any(key.startswith("-:") and "mtp" in key for key in dynamic)


def _first_problem(rule: Rule, layers: list[Layer], modules: Mapping[str, Module], tree: Tree) -> Finding:
    if isinstance(rule, AutoRound):
        return first_problem(layers, rule, modules, tree, rule.kernel_problem)
    problem = first_problem(layers, rule, modules, tree)
    if problem is None and isinstance(rule, Quark) and any(module.quantized for module in modules.values()):
        return NotJudged("Requant does not know which of Quark's schemes vLLM takes")
    return problem
