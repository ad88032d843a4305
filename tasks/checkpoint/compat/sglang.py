"""SGLang: the same configs, read a little differently. Read in its source, not run: no CPU build can be installed.

Sources, in the repository sgl-project/sglang as stored nearest to 0.5.23: layers/quantization/auto_round/auto_round.py
and routing.py, layers/quantization/gptq/gptq.py, layers/quantization/awq/awq.py,
layers/quantization/compressed_tensors/compressed_tensors.py, layers/quantization/fp8.py and utils.py (0.5.23),
model_loader/loader.py (_get_quantization_config), models/qwen3_5.py and models/qwen3_5_mtp.py.

What differs from vLLM:
- names stay as in the checkpoint (Qwen3.5 has no `hf_to_sglang_mapper`);
- auto-round: patterns must match the whole name, there is no suffix match, and `packed_modules_mapping` stays empty:
  a fused layer is looked up by its own name, never by its parts';
- FP8: a name in `modules_to_not_convert` stands for all below it too, and fused layers are asked for by their parts;
- GPTQ: everything is quantized that `dynamic` does not leave out; AWQ: that `modules_to_not_convert` does not contain;
- `mtp.fc` is an nn.Linear and only one MTP layer is built; a tensor of the head without a parameter is skipped with a
  warning: the server starts and drafts nothing (accept length 1.0).

Fused layers of the main model are not judged: read literally, the second point would leave no auto-round checkpoint of
Qwen3.5 with plain `in_proj_a` and `in_proj_b`, and that cannot be tried here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import vllm
from requant.tasks.checkpoint.compat.auto_round import AWQ, GPTQ, AutoRound
from requant.tasks.checkpoint.compat.compressed import Fp8
from requant.tasks.checkpoint.compat.gptq import Awq, Gptq, agreed
from requant.tasks.checkpoint.compat.layers import Tree, first_problem
from requant.tasks.checkpoint.compat.rule import (
    EXPERTS,
    INTEGER,
    LM_HEAD,
    EngineScheme,
    InvalidPattern,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    Rule,
    expand,
    required,
    shorten,
)
from requant.tasks.checkpoint.modules import Module

BITS = {2, 3, 4, 8}
PACKINGS = {GPTQ, AWQ}
METHODS = {
    "auto-round", "gptq", "gptq_marlin", "awq", "awq_marlin", "fp8", "compressed-tensors", "modelopt", "modelopt_fp4",
    "modelopt_mixed", "quark", "mxfp4", "w8a8_int8", "w8a8_fp8", "blockwise_int8", "moe_wna16", "w4afp8",
    "petit_nvfp4", "bitsandbytes", "gguf", "torchao",
}  # fmt: skip
_FUSED_FP8 = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PLAIN = frozenset({"fc", "eh_proj", "gate", "shared_expert_gate", "conv1d", "embed_tokens"})


@dataclass(frozen=True)
class SglangAutoRound(AutoRound):
    """AutoRoundConfig of SGLang: routing.get_layer_config."""

    def scheme(self, layer: Layer) -> EngineScheme:
        name, quantized = layer.name, layer.kind != LM_HEAD
        because = "no block_name_to_quantize: everything is quantized"
        if name in self.extra:
            quantized, because = True, f"extra_config[{name!r}]"
        elif self.blocks:
            quantized, because = name.startswith(tuple(self.blocks)), "block_name_to_quantize"
        if layer.kind == EXPERTS and name not in self.extra:
            found = [self._values(key, quantized) for key in self.extra if key.startswith(name)]
            if found:
                bits, group_size, sym = self._same(found, name)
                return self._made(bits, group_size, sym, "extra_config")
        key = self._pattern(name)
        bits, group_size, sym = self._values(name, quantized)
        return self._made(bits, group_size, sym, because if key is None else f"extra_config[{shorten(key)}]")

    def _made(self, bits: Any, group_size: Any, sym: Any, because: str) -> EngineScheme:
        if not isinstance(bits, int | float):
            raise NotLoadable(f"bits is {shorten(bits)}")
        if bits >= 16:
            return EngineScheme(because=because)
        return EngineScheme(INTEGER, bits, group_size, sym, because, "awq" if self.packing == AWQ else "gptq")

    def _pattern(self, name: str) -> str | None:
        for key in self.keys:
            try:
                if self.patterns.fullmatch(key, name):
                    return key
            except InvalidPattern:
                continue  # as SGLang does
        return None


@dataclass(frozen=True)
class SglangFp8(Fp8):
    """Fp8Config of SGLang: utils.is_layer_skipped, which compares whole components of a path, anywhere in it."""

    def _skipped(self, name: str) -> bool:
        if name.rpartition(".")[2] in _FUSED_FP8:
            return agreed(name, [self._named(part) for part in expand(name, _FUSED_FP8)], "ignored_layers")
        within = "experts" in name and any(name in ignored for ignored in self.ignored if "experts" in ignored)
        return within or self._named(name)

    def _named(self, name: str) -> bool:
        return any(f".{ignored.removeprefix('model.').rstrip('.')}." in f".{name}." for ignored in self.ignored)


def load_problem(checkpoint: Checkpoint, modules: Mapping[str, Module], patterns: Patterns) -> str | None:
    """Why SGLang would not load the main model as it is meant, or None. Fused layers are not judged."""
    known = vllm.architecture(checkpoint).tree
    try:
        rule = _read_rule(checkpoint, patterns)
    except NotLoadable as refusal:
        return f"SGLang refuses quantization_config: {refusal}"
    tree = Tree(Renames(), known.fused, known.plain)
    layers = [layer for layer in tree.layers(modules.values()) if len(layer.parts) == 1 or layer.kind == EXPERTS]
    return None if rule is None else first_problem(layers, rule, modules, tree)


def head_problem(checkpoint: Checkpoint, modules: Mapping[str, Module], patterns: Patterns) -> str | None:
    """Why SGLang would not load the head as it is meant, or None. `modules` are the head's."""
    known = vllm.architecture(checkpoint).tree
    tree = Tree(Renames(), known.fused, known.plain | _PLAIN)
    layers = tree.layers(modules.values())
    plain = [layer for layer in layers if layer.name.rpartition(".")[2] in tree.plain]
    try:
        rule = _read_rule(checkpoint, patterns)
    except NotLoadable as refusal:
        return f"SGLang refuses quantization_config: {refusal}"
    return first_problem(plain if rule is None else layers, rule or vllm.Unquantized(), modules, tree)


def _read_rule(checkpoint: Checkpoint, patterns: Patterns) -> Rule | None:
    """The rule of the config; None where none is written for its method. Raises Refused where SGLang refuses it."""
    quantization = vllm.quantization_of(checkpoint.config)
    method = quantization.get("quant_method", "") if quantization else ""
    if not isinstance(method, str):
        raise NotLoadable(f"quant_method is {shorten(method)}")
    method = method.lower().replace("compressed_tensors", "compressed-tensors")
    if quantization is None or not method:
        return vllm.Unquantized()
    if method not in METHODS:
        raise NotLoadable(f"quant_method is {shorten(method)}, which SGLang does not know")
    if method == "auto-round":
        return _auto_round(quantization, patterns)
    if method.startswith("gptq"):
        if [quantization.get("bits"), quantization.get("sym")] not in ([4, True], [8, True]):
            return None  # not Marlin's, but another class's, which takes more
        # Never by the tensors: a list that names everything stands for "all".
        everything = {**quantization, "modules_in_block_to_quantize": [""]}
        return Gptq.read({**everything, "desc_act": False}, Renames(), {}, patterns, ())
    if method.startswith("awq"):
        return Awq.read(quantization, Renames(), {}, ())
    if method == "fp8":
        return SglangFp8(**vars(Fp8.read(quantization, Renames(), {})))
    return vllm.read_rule(quantization, Renames(), {}, patterns, checkpoint) if method in vllm.SHARED else None


def _auto_round(quantization: Mapping[str, Any], patterns: Patterns) -> SglangAutoRound:
    required(quantization, "sym")
    rule = SglangAutoRound.read(quantization, Renames(), {}, patterns)
    if rule.bits not in BITS or rule.packing not in PACKINGS or rule.data_type != "int":
        raise NotLoadable(f"bits={rule.bits}, packing_format={rule.packing!r}, data_type={rule.data_type!r}")
    return SglangAutoRound(**vars(rule))
