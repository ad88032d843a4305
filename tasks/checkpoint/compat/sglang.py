"""SGLang: the same configs, with some differences. The rules are from its source and were not tried: there is no build
for CPUs that can be installed. infra/dev/engines/differences.py compares its tables with those here.

Sources: SGLang 0.5.23, srt/configs/model_config.py (_verify_quantization, _parse_quant_hf_config);
srt/layers/quantization: auto_round.py, gptq/gptq.py, awq/awq.py,
compressed_tensors/compressed_tensors.py, fp8.py and utils.py, marlin_utils.py, mlx.py;
srt/model_loader/loader.py (_get_quantization_config), srt/models/qwen3_5.py and qwen3_5_mtp.py.

Differences from vLLM:
- Names stay as in the checkpoint (Qwen3.5 has no `hf_to_sglang_mapper`).
- auto-round: a pattern must match the complete name, suffixes do not match, and `packed_modules_mapping` stays empty:
  a fused layer is looked up by its own name and never by the names of its parts.
- FP8: a name in `modules_to_not_convert` includes all modules below it, and fused layers are looked up by their parts.
- A config without `quant_method` is refused, unless it is ModelOpt's.
- GPTQ is loaded by `gptq_marlin` or not at all: `gptq` is in the list of methods for CPU, XPU and NPU only.
- GPTQ quantizes every layer that `dynamic` does not exclude, AWQ every layer that `modules_to_not_convert` does not
  name.
- `mtp.fc` is an nn.Linear, and only one MTP layer is built. A tensor of the head without a parameter is skipped with a
  warning: the server starts, and no draft is accepted (accept length 1.0).

Fused layers of the main model are not judged. By the second point, SGLang could not load any auto-round checkpoint of
Qwen3.5 whose `in_proj_a` and `in_proj_b` are not quantized, and that cannot be tried here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import vllm
from requant.tasks.checkpoint.compat.auto_round import AWQ, EVERYTHING, GPTQ, AutoRound
from requant.tasks.checkpoint.compat.compressed import Fp8
from requant.tasks.checkpoint.compat.gptq import Awq, Gptq, agreed
from requant.tasks.checkpoint.compat.layers import Tree, first_problem
from requant.tasks.checkpoint.compat.rule import (
    EXPERTS,
    INTEGER,
    LM_HEAD,
    EngineScheme,
    Finding,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    Rule,
    SchemeValues,
    expand,
    required,
    shorten,
)
from requant.tasks.checkpoint.config import QuantizationConfig
from requant.tasks.checkpoint.methods import BY_STATED, MLX
from requant.tasks.checkpoint.modules import Module

VERSION = "0.5.23"
BITS = {2, 3, 4, 8}
PACKINGS = {GPTQ, AWQ}
# srt/layers/quantization/__init__.py, BASE_QUANTIZATION_METHODS, with what it adds on a GPU of NVIDIA
METHODS = frozenset({
    "fp8", "mxfp8", "minimax_m3_nvfp4", "blockwise_int8", "modelopt", "modelopt_fp8", "modelopt_fp4", "nvfp4_online",
    "modelopt_mixed", "w8a8_int8", "w8a8_fp8", "awq", "awq_marlin", "bitsandbytes", "gguf", "gptq_marlin", "moe_wna16",
    "compressed-tensors", "w4afp8", "petit_nvfp4", "quark", "quark_mxfp4", "auto-round", "auto-round-int8", "modelslim",
    "quark_int4fp8_moe", "humming", "mxfp_w4a8", "mxfp4",
})  # fmt: skip
MODELOPT = BY_STATED["modelopt"]  # its config may lack quant_method
GPTQ_SCHEMES = ([4, True], [8, True])  # gptq/gptq.py, GPTQMarlinConfig.TYPE_MAP: bits, sym
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)  # marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES
_FUSED_FP8 = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_CONVERTED = frozenset({"wk", "weights_proj"})  # of the indexer: deepseek_weight_loader.py, _load_fused_indexer_wk
_PLAIN = frozenset({"fc", "eh_proj", "gate", "shared_expert_gate", "conv1d", "embed_tokens"})


@dataclass(frozen=True)
class SglangAutoRound(AutoRound):
    """A config of auto-round, as AutoRoundConfig.get_layer_config of SGLang reads it."""

    def scheme(self, layer: Layer) -> EngineScheme:
        """Decide as AutoRoundConfig.get_layer_config does."""
        name, quantized = layer.name, layer.kind != LM_HEAD
        because = EVERYTHING
        if name in self.extra:
            quantized, because = True, f"extra_config[{name!r}]"
        elif self.blocks:
            quantized, because = name.startswith(tuple(self.blocks)), "block_name_to_quantize"
        if layer.kind == EXPERTS and name not in self.extra:
            schemes = [self._values(key, quantized) for key in self.extra if key.startswith(name)]
            if schemes:
                return self._engine_scheme(self._agreed(schemes, name), "extra_config")
        key = self._matching_key(name)
        return self._engine_scheme(
            self._values(name, quantized), because if key is None else f"extra_config[{shorten(key)}]"
        )

    def kernel_problem(self, layer: Layer, scheme: EngineScheme) -> str | None:
        """Return why no kernel for NVIDIA's GPUs takes this scheme, or None.

        Sources: auto_round.py, apply_gptq_quant_layer; gptq/schemes/gptq_linear.py, GPTQLinearScheme, which raises.
        """
        if scheme.storage != INTEGER or scheme.layout != "gptq" or layer.kind == EXPERTS:
            return None
        marlin = self.backend == "auto" or "marlin" in self.backend
        if marlin and [scheme.bits, scheme.sym] in GPTQ_SCHEMES and scheme.group_size in MARLIN_GROUP_SIZES:
            return None
        return (
            f"bits={scheme.bits!r}, group_size={scheme.group_size!r}, sym={scheme.sym!r} ({layer.name}); SGLang has "
            "removed all GPTQ kernels but gptq_marlin's"
        )

    def _engine_scheme(self, values: SchemeValues, because: str) -> EngineScheme:
        if not isinstance(values.bits, int | float):
            raise NotLoadable(f"bits is {shorten(values.bits)}")
        if values.bits >= 16:
            return EngineScheme(because=because)
        return EngineScheme(INTEGER, *values, because, "awq" if self.packing == AWQ else "gptq")

    def _matching_key(self, name: str) -> str | None:
        return self.patterns.first("fullmatch", self.keys, name)  # SGLang passes over invalid ones too.


@dataclass(frozen=True)
class SglangFp8(Fp8):
    """A config of the method fp8, as utils.is_layer_skipped of SGLang reads it.

    It looks for complete components of a path, anywhere in the path.
    """

    def _skipped(self, name: str) -> bool:
        if name.rpartition(".")[2] in _FUSED_FP8:
            return agreed(name, [self._named(part) for part in expand(name, _FUSED_FP8)], "ignored_layers")
        within = "experts" in name and any(name in ignored for ignored in self.ignored if "experts" in ignored)
        return within or self._named(name)

    def _named(self, name: str) -> bool:
        return any(f".{ignored.removeprefix('model.').rstrip('.')}." in f".{name}." for ignored in self.ignored)


def load_problem(checkpoint: Checkpoint, modules: Mapping[str, Module], patterns: Patterns) -> Finding:
    """Return why SGLang would not load the main model correctly, or None. Fused layers are not judged.

    `modules`: the modules outside the MTP head.
    """
    known = vllm.architecture(checkpoint).tree
    try:
        rule = _read_rule(checkpoint, patterns)
    except NotLoadable as refusal:
        return f"SGLang refuses quantization_config: {refusal}"
    tree = Tree(Renames(), known.fused, known.plain, _CONVERTED)
    layers = [layer for layer in tree.layers(modules.values()) if len(layer.parts) == 1 or layer.kind == EXPERTS]
    return vllm.no_rules(checkpoint) if rule is None else _first_problem(layers, rule, modules, tree)


def head_problem(checkpoint: Checkpoint, modules: Mapping[str, Module], patterns: Patterns) -> Finding:
    """Return why SGLang would not load the MTP head correctly, or None. `modules`: the modules of the head."""
    known = vllm.architecture(checkpoint).tree
    tree = Tree(Renames(), known.fused, known.plain | _PLAIN, _CONVERTED)
    layers = tree.layers(modules.values())
    plain = [layer for layer in layers if layer.name.rpartition(".")[2] in tree.plain]
    try:
        rule = _read_rule(checkpoint, patterns)
    except NotLoadable as refusal:
        return f"SGLang refuses quantization_config: {refusal}"
    if rule is None:
        return first_problem(plain, vllm.Unquantized(), modules, tree) or vllm.no_rules(checkpoint)
    return _first_problem(layers, rule, modules, tree)


def _first_problem(layers: list[Layer], rule: Rule, modules: Mapping[str, Module], tree: Tree) -> str | None:
    if isinstance(rule, SglangAutoRound):
        return first_problem(layers, rule, modules, tree, rule.kernel_problem)
    return first_problem(layers, rule, modules, tree)


def _read_rule(checkpoint: Checkpoint, patterns: Patterns) -> Rule | None:
    """Return the rule of the config; None if Requant has no rules for its method.

    Raises NotLoadable if SGLang refuses the config.
    """
    quantization = vllm.quantization_of(checkpoint)
    if checkpoint.method is MLX:
        raise NotLoadable("it is MLX's, which SGLang knows on Apple's computers only")
    if quantization is None:
        return vllm.Unquantized()
    if not isinstance(stated := quantization.get("quant_method", ""), str):
        raise NotLoadable(f"quant_method is {shorten(stated)}")
    method = quantization.method
    if not method and checkpoint.method is MODELOPT:
        return None
    if not method:
        raise NotLoadable("it has no quant_method")
    if method not in METHODS and method != "gptq":
        raise NotLoadable(f"quant_method is {shorten(method)}, which SGLang does not know")
    if method == "auto-round":
        return _auto_round(quantization, patterns)
    if method in ("gptq", "gptq_marlin"):
        _check_marlin(quantization)
        # SGLang does not look at the tensors. A list with an empty name matches every module.
        everything = QuantizationConfig({**quantization, "modules_in_block_to_quantize": [""], "desc_act": False})
        return Gptq.read(everything, Renames(), {}, patterns, ())
    if method.startswith("awq"):
        return Awq.read(quantization, Renames(), {}, ())
    if method == "fp8" and checkpoint.config.get("model_type") in vllm.DEEPSEEK_V4:
        return None  # its experts are stored in another way: model_config.py, is_fp4_experts
    if method == "fp8":
        return SglangFp8(**vars(Fp8.read(quantization, Renames(), {})))
    return vllm.read_rule(quantization, Renames(), {}, patterns, checkpoint) if method in vllm.SHARED else None


def _check_marlin(quantization: QuantizationConfig) -> None:
    """Check that GPTQMarlinConfig takes a config: nothing else in SGLang's list of methods does. Raises NotLoadable."""
    bits, sym, size = (quantization.get(key) for key in ("bits", "sym", "group_size"))
    if [bits, sym] not in GPTQ_SCHEMES or type(bits) is not int:
        raise NotLoadable(f"bits={shorten(bits)} with sym={shorten(sym)}; gptq_marlin takes 4 or 8, symmetric")
    if quantization.method == "gptq_marlin":  # stated so, it is not asked whether it fits
        return
    if type(size) is not int or size not in MARLIN_GROUP_SIZES or quantization.get("desc_act") is None:
        raise NotLoadable(
            f"group_size is {shorten(size)} and desc_act {shorten(quantization.get('desc_act'))}; gptq_marlin takes "
            f"{', '.join(map(str, MARLIN_GROUP_SIZES))}, and needs both"
        )
    if quantization.get("checkpoint_format") == "marlin" or quantization.get("is_marlin_format", False):
        raise NotLoadable("its checkpoint_format is marlin, which SGLang no longer takes")


def _auto_round(quantization: QuantizationConfig, patterns: Patterns) -> SglangAutoRound:
    required(quantization, "sym")
    rule = SglangAutoRound.read(quantization, Renames(), {}, patterns)
    if rule.bits not in BITS or rule.packing not in PACKINGS or rule.data_type != "int":
        raise NotLoadable(f"bits={rule.bits}, packing_format={rule.packing!r}, data_type={rule.data_type!r}")
    return SglangAutoRound(**vars(rule))
