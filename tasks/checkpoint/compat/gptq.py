"""GPTQ and AWQ checkpoints, as vLLM reads them.

Sources: vLLM 0.32.0, model_executor/layers/quantization/auto_gptq.py, auto_awq.py, utils/gptq_utils.py and
utils/quant_utils.py (is_layer_skipped). Compared with these classes by tests/engines/test_rules.py.
Both take what is quantized from the tensors' dtypes where the config has no list; then the rule cannot disagree with
the tensors but through names: lists are matched as substrings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    Substrings,
    expand,
    required,
    shorten,
)
from requant.tasks.checkpoint.header import Tensor

GPTQ_SCHEMES = {(4, True), (8, True)}  # AutoGPTQConfig.TYPE_MAP: bits, sym
AWQ_BITS = {4}  # AutoAWQConfig.TYPE_MAP
FLOATS = {"F16", "BF16", "F32"}


@dataclass(frozen=True)
class Gptq:
    """A GPTQ config. `listed` is None where nothing is known: then everything is quantized."""

    bits: int
    group_size: Any
    sym: Any
    desc_act: Any
    lm_head: Any
    dynamic: dict[str, Any]
    listed: Substrings | None
    because: str
    fused: Fused
    patterns: Patterns

    @classmethod
    def read(
        cls,
        quantization: Mapping[str, Any],
        renames: Renames,
        fused: Fused,
        patterns: Patterns,
        tensors: Iterable[Tensor],
    ) -> Gptq:
        """AutoGPTQConfig.from_config, maybe_update_config, apply_vllm_mapper. Raises Refused where they raise."""
        dynamic = quantization.get("dynamic")
        dynamic = {} if dynamic is None else dynamic
        if not isinstance(dynamic, dict):
            raise NotLoadable(f"dynamic is {shorten(dynamic)}, and no mapping")
        bits, group_size = required(quantization, "bits"), required(quantization, "group_size")
        desc_act, sym = required(quantization, "desc_act"), required(quantization, "sym")
        check_order(desc_act, group_size, dynamic)
        _known(bits, sym)
        modules, because = quantization.get("modules_in_block_to_quantize"), "modules_in_block_to_quantize"
        if modules:
            if isinstance(modules, list) and all(isinstance(item, list) for item in modules):
                modules = [name for inner in modules for name in inner]
            names = renames.of_list(modules, because)
        else:
            names = [renames.of(name, because) for name in sorted(quantized_names(tensors)[0])]
            because = "the tensors"
        desc_act = desc_act and group_size != -1
        listed = Substrings.of(names) if names else None
        lm_head = quantization.get("lm_head", False)
        return cls(bits, group_size, sym, desc_act, lm_head, dynamic, listed, because, fused, patterns)

    def scheme(self, layer: Layer) -> EngineScheme:
        """AutoGPTQConfig.get_quant_method."""
        if layer.kind == LM_HEAD and not self.lm_head:
            return EngineScheme(because="lm_head")
        listed = layer.kind == EXPERTS or self._listed(layer.name)  # experts are quantized, listed or not
        key, override = self._override(layer.name)
        if override is False:
            return EngineScheme(because=f"dynamic[{shorten(key)}]")
        if not listed:
            return EngineScheme(because=self.because)
        values: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "sym": self.sym}
        if key is not None:
            if not isinstance(override, dict):
                raise NotLoadable(f"dynamic[{shorten(key)}] is {shorten(override)}, and no mapping")
            kinds = {"bits": int, "group_size": int, "sym": bool}
            values |= {k: override[k] for k, kind in kinds.items() if isinstance(override.get(k), kind)}
        _known(values["bits"], values["sym"])
        because = self.because if key is None else f"dynamic[{shorten(key)}]"
        return EngineScheme(INTEGER, values["bits"], values["group_size"], values["sym"], because)

    def _listed(self, name: str) -> bool:
        """is_layer_gptq_quantized."""
        if self.listed is None:
            return True
        return agreed(name, [self.listed.within(part) for part in expand(name, self.fused)], self.because)

    def _override(self, name: str) -> tuple[str | None, Any]:
        """get_dynamic_override: the first key that matches, and its value; False for one that begins with `-:`."""
        for key, value in self.dynamic.items():
            if key.startswith("-:"):
                if self.patterns.match(key.removeprefix("-:"), name):
                    return key, False
            elif self.patterns.match(key.removeprefix("+:"), name):
                return key, value
        return None, None


@dataclass(frozen=True)
class Awq:
    """An AWQ config. `skipped` are names of modules that are not quantized."""

    bits: int
    group_size: Any
    zero_point: Any
    lm_head: Any
    skipped: Substrings
    because: str
    fused: Fused

    @classmethod
    def read(cls, quantization: Mapping[str, Any], renames: Renames, fused: Fused, tensors: Iterable[Tensor]) -> Awq:
        """AutoAWQConfig.from_config, maybe_update_config, apply_vllm_mapper. Raises Refused where they raise."""
        bits = required(quantization, "w_bit", "bits")
        group_size = required(quantization, "q_group_size", "group_size")
        zero_point = required(quantization, "zero_point")
        if type(bits) is not int or bits not in AWQ_BITS:
            raise NotLoadable(f"bits is {shorten(bits)}; AWQ takes 4")
        modules, because = quantization.get("modules_to_not_convert"), "modules_to_not_convert"
        if modules:
            names = renames.of_list(modules, because)
        else:
            packed, every = quantized_names(tensors)
            names = [renames.of(name, because) for name in every - packed]
            because = "the tensors"
        return cls(
            bits, group_size, zero_point, quantization.get("lm_head", False), Substrings.of(names), because, fused
        )

    def scheme(self, layer: Layer) -> EngineScheme:
        """AutoAWQConfig.get_quant_method. Experts are looked up by their whole name only."""
        if layer.kind == LM_HEAD and not self.lm_head:
            return EngineScheme(because="lm_head")
        fused = {} if layer.kind == EXPERTS else self.fused
        names = expand(layer.name, fused)
        whole = layer.name.rpartition(".")[2] in fused and self.skipped.within(layer.name)
        if whole or agreed(layer.name, [self.skipped.within(name) for name in names], self.because):
            return EngineScheme(because=self.because)
        return EngineScheme(INTEGER, self.bits, self.group_size, not self.zero_point, self.because, "awq")


def quantized_names(tensors: Iterable[Tensor]) -> tuple[set[str], set[str]]:
    """Names of modules with a tensor of another dtype than 16- or 32-bit floats, and of all modules."""
    packed, every = set(), set()
    for tensor in tensors:
        module = tensor.name.rsplit(".", 1)[0]
        every.add(module)
        if tensor.dtype not in FLOATS:
            packed.add(module)
    return packed, every


def check_order(desc_act: Any, group_size: Any, dynamic: Mapping[str, Any]) -> None:
    """normalize_and_validate_gptq_desc_act. Raises Refused."""
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
    """The one answer for all parts of a layer. Raises Refused if they differ."""
    if len(set(answers)) > 1:
        raise NotLoadable(f"{where} treats the parts of {name} differently, which are one layer in the engine")
    return answers[0]


def _known(bits: Any, sym: Any) -> None:
    if type(bits) is not int or not isinstance(sym, bool | int) or (bits, sym) not in GPTQ_SCHEMES:
        raise NotLoadable(f"bits={shorten(bits)} with sym={shorten(sym)}; GPTQ takes 4 or 8, symmetric")
