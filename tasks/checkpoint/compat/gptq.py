"""GPTQ and AWQ checkpoints, as vLLM reads them.

Sources: vLLM 0.32.0, model_executor/layers/quantization/auto_gptq.py, auto_awq.py, utils/gptq_utils.py and
utils/quant_utils.py (is_layer_skipped). Compared with these classes by tests/engines/test_rules.py.
If the config has no list of modules, both take the quantized modules from the dtypes of the tensors. The rule can then
contradict the tensors only because names in lists match as substrings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from requant.tasks.checkpoint.compat.rule import (
    EXPERTS,
    INTEGER,
    LM_HEAD,
    EngineScheme,
    Fused,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    SchemeValues,
    Substrings,
    expand,
    mapping,
    required,
    shorten,
)
from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig
from requant.tasks.checkpoint.header import Tensor

GPTQ_SCHEMES = {(4, True), (8, True)}  # AutoGPTQConfig.TYPE_MAP: bits, sym
AWQ_BITS = {4}  # AutoAWQConfig.TYPE_MAP
FLOATS = {"F16", "BF16", "F32"}


@dataclass(frozen=True)
class Gptq:
    """A config of GPTQ. `listed`: the quantized modules; None if unknown, which means all.

    `limited`: whether only the schemes are taken for which vLLM has kernels.
    """

    bits: int
    group_size: Any
    sym: Any
    lm_head: Any
    dynamic: JsonObject
    listed: Substrings | None
    because: str
    fused: Fused
    patterns: Patterns
    limited: bool = False

    @classmethod
    def read(
        cls,
        quantization: QuantizationConfig,
        renames: Renames,
        fused: Fused,
        patterns: Patterns,
        tensors: Iterable[Tensor],
    ) -> Gptq:
        """Read a config as AutoGPTQConfig.from_config, maybe_update_config and apply_vllm_mapper do.

        Raises NotLoadable if they raise.
        """
        desc_act, sym = required(quantization, "desc_act"), required(quantization, "sym")
        rule = cls.of(quantization, renames, fused, patterns, tensors)
        check_order(desc_act, rule.group_size, rule.dynamic)
        _known(rule.bits, sym)
        return replace(rule, limited=True)

    @classmethod
    def of(
        cls,
        quantization: QuantizationConfig,
        renames: Renames,
        fused: Fused,
        patterns: Patterns,
        tensors: Iterable[Tensor],
    ) -> Gptq:
        """Read what a config says of layers, whether vLLM has kernels for it or not.

        Raises NotLoadable for fields of the wrong type, and without bits or group size.
        """
        dynamic = mapping(quantization, "dynamic")
        bits, group_size = required(quantization, "bits"), required(quantization, "group_size")
        sym = quantization.get("sym", True)
        modules, because = quantization.get("modules_in_block_to_quantize"), "modules_in_block_to_quantize"
        if modules:
            if isinstance(modules, list) and all(isinstance(item, list) for item in modules):
                modules = [name for inner in modules for name in inner]
            names = renames.of_list(modules, because)
        else:
            names = [renames.of(name, because) for name in sorted(quantized_names(tensors)[0])]
            because = "the tensors"
        listed = Substrings.of(names) if names else None
        lm_head = quantization.get("lm_head", False)
        return cls(bits, group_size, sym, lm_head, dynamic, listed, because, fused, patterns)

    def scheme(self, layer: Layer) -> EngineScheme:
        """Decide as AutoGPTQConfig.get_quant_method does."""
        if layer.kind == LM_HEAD and not self.lm_head:
            return EngineScheme(because="lm_head")
        listed = layer.kind == EXPERTS or self._listed(layer.name)  # experts are quantized, listed or not
        key, override = self._override(layer.name)
        if override is False:
            return EngineScheme(because=f"dynamic[{shorten(key)}]")
        if not listed:
            return EngineScheme(because=self.because)
        values = SchemeValues(self.bits, self.group_size, self.sym)
        if key is not None:
            if not isinstance(override, dict):
                raise NotLoadable(f"dynamic[{shorten(key)}] is {shorten(override)}, and no mapping")
            kinds = {"bits": int, "group_size": int, "sym": bool}
            values = values._replace(
                **{k: override[k] for k, kind in kinds.items() if isinstance(override.get(k), kind)}
            )
        if self.limited:
            _known(values.bits, values.sym)
        because = self.because if key is None else f"dynamic[{shorten(key)}]"
        return EngineScheme(INTEGER, *values, because)

    def _listed(self, name: str) -> bool:
        """Decide as is_layer_gptq_quantized does."""
        if self.listed is None:
            return True
        return agreed(name, [self.listed.within(part) for part in expand(name, self.fused)], self.because)

    def _override(self, name: str) -> tuple[str | None, Any]:
        """Return the first key of `dynamic` that matches, and its value, as get_dynamic_override does.

        The value is False for a key that begins with `-:`. Without a match, key and value are None.
        """
        for key, value in self.dynamic.items():
            if key.startswith("-:"):
                if self.patterns.match(key.removeprefix("-:"), name):
                    return key, False
            elif self.patterns.match(key.removeprefix("+:"), name):
                return key, value
        return None, None


@dataclass(frozen=True)
class Awq:
    """A config of AWQ. `skipped`: names of modules that are not quantized."""

    bits: int
    group_size: Any
    zero_point: Any
    lm_head: Any
    skipped: Substrings
    because: str
    fused: Fused

    @classmethod
    def read(cls, quantization: QuantizationConfig, renames: Renames, fused: Fused, tensors: Iterable[Tensor]) -> Awq:
        """Read a config as AutoAWQConfig.from_config, maybe_update_config and apply_vllm_mapper do.

        Raises NotLoadable if they raise.
        """
        required(quantization, "zero_point")
        rule = cls.of(quantization, renames, fused, tensors)
        if type(rule.bits) is not int or rule.bits not in AWQ_BITS:
            raise NotLoadable(f"bits is {shorten(rule.bits)}; AWQ takes 4")
        return rule

    @classmethod
    def of(cls, quantization: QuantizationConfig, renames: Renames, fused: Fused, tensors: Iterable[Tensor]) -> Awq:
        """Read what a config says of layers, whether vLLM has kernels for it or not.

        Raises NotLoadable for fields of the wrong type, and without bits or group size.
        """
        bits = required(quantization, "w_bit", "bits")
        group_size = required(quantization, "q_group_size", "group_size")
        zero_point = quantization.get("zero_point", True)
        modules, because = quantization.get("modules_to_not_convert"), "modules_to_not_convert"
        if modules:
            names = renames.of_list(modules, because)
        else:
            quantized, names_of_all = quantized_names(tensors)
            names = [renames.of(name, because) for name in names_of_all - quantized]
            because = "the tensors"
        return cls(
            bits, group_size, zero_point, quantization.get("lm_head", False), Substrings.of(names), because, fused
        )

    def scheme(self, layer: Layer) -> EngineScheme:
        """Decide as AutoAWQConfig.get_quant_method does. Experts are looked up only by the name of their layer."""
        if layer.kind == LM_HEAD and not self.lm_head:
            return EngineScheme(because="lm_head")
        fused = {} if layer.kind == EXPERTS else self.fused
        names = expand(layer.name, fused)
        fused_itself = layer.name.rpartition(".")[2] in fused and self.skipped.within(layer.name)
        if fused_itself or agreed(layer.name, [self.skipped.within(name) for name in names], self.because):
            return EngineScheme(because=self.because)
        return EngineScheme(INTEGER, self.bits, self.group_size, not self.zero_point, self.because, "awq")


def quantized_names(tensors: Iterable[Tensor]) -> tuple[set[str], set[str]]:
    """Return the names of quantized modules and of all modules.

    A module with a tensor that is not F16, BF16 or F32 counts as quantized.
    """
    quantized, all_modules = set(), set()
    for tensor in tensors:
        module = tensor.name.rsplit(".", 1)[0]
        all_modules.add(module)
        if tensor.dtype not in FLOATS:
            quantized.add(module)
    return quantized, all_modules


def check_order(desc_act: Any, group_size: Any, dynamic: JsonObject) -> None:
    """Check as normalize_and_validate_gptq_desc_act does. Raises NotLoadable."""
    if desc_act and group_size != -1:
        raise NotLoadable(
            "desc_act is true with groups, which vLLM no longer takes: quantize again with desc_act false"
        )
    for key, override in dynamic.items():
        if key.startswith("-:") or not isinstance(override, dict):
            continue
        if override.get("desc_act", desc_act) and override.get("group_size", group_size) != -1:
            raise NotLoadable(f"dynamic[{shorten(key)}] has desc_act true with groups, which vLLM no longer takes")


def agreed(name: str, answers: list[bool], where: str) -> bool:
    """Return the answer that all parts of a layer share. Raises NotLoadable if the answers differ."""
    if len(set(answers)) > 1:
        raise NotLoadable(f"{where} treats the parts of {name} differently, which are one layer in the engine")
    return answers[0]


def _known(bits: Any, sym: Any) -> None:
    if type(bits) is not int or not isinstance(sym, bool | int) or (bits, sym) not in GPTQ_SCHEMES:
        raise NotLoadable(f"bits={shorten(bits)} with sym={shorten(sym)}; GPTQ takes 4 or 8, symmetric")
