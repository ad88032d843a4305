"""vLLM: which quantization configs it takes, how it names layers, and whether a head would draft there.

Sources: vLLM 0.32.0 (0.33 the same as far as read): config/model.py (_verify_quantization),
config/speculative.py (hf_config_override), model_executor/model_loader/utils.py (configure_quant_config),
model_executor/models/{qwen3_5,qwen3_5_mtp,qwen3_next,qwen3_next_mtp,deepseek_v2,deepseek_mtp,glm4_moe,glm4_moe_mtp}.py.

The draft model is built with the main model's quantization config object: names in it are already renamed for the main
model, and the draft's own table of fused layers replaces the main model's where it has one. In a quantized model
vLLM does not check that every parameter got a tensor: what is missing stays uninitialized without a word. A tensor
that has no parameter stops the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat.auto_round import AutoRound
from requant.tasks.checkpoint.compat.compressed import CompressedTensors, Fp8
from requant.tasks.checkpoint.compat.gptq import Awq, Gptq
from requant.tasks.checkpoint.compat.layers import Tree, first_problem
from requant.tasks.checkpoint.compat.rule import (
    EngineScheme,
    Fused,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    Rule,
    shorten,
)
from requant.tasks.checkpoint.modules import Module

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


@dataclass(frozen=True)
class Architecture:
    """One of vLLM's model classes: its names, and those of its draft model.

    `draft_fused`: the draft's own table of fused layers; None where it keeps the main model's. `draft_plain`: leaves
    of the head's layers that are built plain.
    """

    tree: Tree
    draft_fused: Fused | None = None
    draft_plain: frozenset[str] = frozenset()
    dynamic_shortcut: bool = False  # qwen3_5_mtp.py: a `-:` key of `dynamic` with `mtp` in it makes the layers plain


_DENSE = Tree(Renames(), {**_QKV, **_GATE_UP}, _ROUTERS)
_LATENT = Tree(
    Renames(), {**_GATE_UP, "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}, _ROUTERS
)  # deepseek_v2.py fuses the two where q_lora_rank is set
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

# QUANTIZATION_METHODS that vLLM takes and that have no rules here.
UNJUDGED = frozenset(
    [
        "modelopt",
        "modelopt_fp4",
        "modelopt_mxfp8",
        "modelopt_mixed",
        "humming",
        "experts_int8",
        "quark",
        "moe_wna16",
        "torchao",
        "mxfp4",
        "gpt_oss_mxfp4",
        "deepseek_v4_fp8",
        "online",
        "mxfp8",
    ]
)
SHARED = frozenset({"fp8", "compressed-tensors"})  # SGLang's are the same as far as read
JUDGED = SHARED | {"auto-round", "inc", "gptq", "gptq_marlin", "auto_gptq", "awq", "awq_marlin", "auto_awq"}


class Unquantized:
    """The rule of a checkpoint without a quantization config."""

    def scheme(self, layer: Layer) -> EngineScheme:
        return EngineScheme(because="there is no quantization_config")


def architecture(checkpoint: Checkpoint) -> Architecture:
    """By the first of the config's `architectures`, as vLLM picks its class."""
    names = checkpoint.config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return ARCHITECTURES.get(first, UNKNOWN_ARCHITECTURE) if isinstance(first, str) else UNKNOWN_ARCHITECTURE


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization config that vLLM finds in a model config, or None. Raises Refused if it is no mapping."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        found = place.get("quantization_config", place.get("compression_config"))
        if isinstance(found, dict):
            return found
        if found is not None:
            raise NotLoadable(f"it is {shorten(found)}, and no mapping")
    return None


def method_of(quantization: Mapping[str, Any]) -> str:
    """`quant_method` as model_arch_config_convertor.py normalizes it. Raises Refused if vLLM does not know it."""
    method = quantization.get("quant_method", "")
    if not isinstance(method, str):
        raise NotLoadable(f"quant_method is {shorten(method)}")
    method = method.lower().replace("compressed_tensors", "compressed-tensors")
    if method and method not in JUDGED | UNJUDGED:
        raise NotLoadable(f"quant_method is {shorten(method)}, which vLLM does not know")
    return method


def read_rule(
    quantization: Mapping[str, Any] | None, renames: Renames, fused: Fused, patterns: Patterns, checkpoint: Checkpoint
) -> Rule | None:
    """The rule of a config; None where none is written for its method. Raises Refused where vLLM refuses it."""
    method = method_of(quantization) if quantization is not None else ""
    if quantization is None or not method:
        return Unquantized()
    if method in UNJUDGED:
        return None
    if method in ("auto-round", "inc"):
        return AutoRound.read(quantization, renames, fused, patterns)
    if "gptq" in method:
        return Gptq.read(quantization, renames, fused, patterns, checkpoint.tensors.values())
    if "awq" in method:
        return Awq.read(quantization, renames, fused, checkpoint.tensors.values())
    if method == "fp8":
        return Fp8.read(quantization, renames, fused)
    return CompressedTensors.read(quantization, renames, fused, patterns)


def load_problem(checkpoint: Checkpoint, modules: Mapping[str, Module], patterns: Patterns) -> str | None:
    """Why vLLM would not load the main model as it is meant, or None."""
    tree = architecture(checkpoint).tree
    try:
        rule = read_rule(quantization_of(checkpoint.config), tree.renames, tree.fused, patterns, checkpoint)
    except NotLoadable as refusal:
        return f"vLLM refuses quantization_config: {refusal}"
    if rule is None:
        return None
    return _first_problem(rule, tree.layers(modules.values()), modules, tree)


def head_problem(checkpoint: Checkpoint, modules: Mapping[str, Module], patterns: Patterns) -> str | None:
    """Why vLLM would not load the head as it is meant, or None. `modules` are the head's."""
    known = architecture(checkpoint)
    fused = known.tree.fused if known.draft_fused is None else known.draft_fused
    tree = Tree(known.tree.renames, fused, known.tree.plain | known.draft_plain)
    try:
        quantization = quantization_of(checkpoint.config)
        rule = read_rule(quantization, tree.renames, fused, patterns, checkpoint)
        shortcut = known.dynamic_shortcut and bool(quantization) and _mtp_left_out(quantization or {})
    except NotLoadable as refusal:
        return f"vLLM refuses quantization_config: {refusal}"
    if rule is None:
        return None
    layers = tree.layers(modules.values())
    if shortcut:
        inner = [layer for layer in layers if ".layers." in layer.name]
        problem = _first_problem(_LeftOut(), inner, modules, tree)
        if problem:
            return problem
        layers = [layer for layer in layers if ".layers." not in layer.name]
    return _first_problem(rule, layers, modules, tree)


class _LeftOut:
    def scheme(self, layer: Layer) -> EngineScheme:
        return EngineScheme(because="dynamic leaves mtp out")


def _mtp_left_out(quantization: Mapping[str, Any]) -> bool:
    dynamic = quantization.get("dynamic", {})
    if not isinstance(dynamic, dict):
        raise NotLoadable(f"dynamic is {shorten(dynamic)}, and no mapping")
    return any(key.startswith("-:") and "mtp" in key for key in dynamic)


def _first_problem(rule: Rule, layers: list[Layer], modules: Mapping[str, Module], tree: Tree) -> str | None:
    if isinstance(rule, AutoRound):
        return first_problem(layers, rule, modules, tree, rule.kernel_problem)
    return first_problem(layers, rule, modules, tree)
