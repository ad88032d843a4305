"""compressed-tensors and FP8 checkpoints, as vLLM reads them.

Sources: vLLM 0.32.0, model_executor/layers/quantization/compressed_tensors/compressed_tensors.py and utils.py,
compressed_tensors_moe/compressed_tensors_moe.py, utils/config_utils.py (find_matching_patterns), fp8.py and
utils/quant_utils.py (is_layer_skipped). Compared with these classes by tests/engines/test_rules.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from requant.tasks.checkpoint.compat.gptq import agreed
from requant.tasks.checkpoint.compat.rule import (
    COMPRESSED,
    EXPERTS,
    LM_HEAD,
    SCALED,
    EngineScheme,
    Fused,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    expand,
    required,
    shorten,
)

PACKED_FORMATS = {"pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "marlin-24"}
WNA16_BITS = {2, 3, 4, 5, 6, 7, 8}
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class CompressedTensors:
    """One config: schemes by target, in the order of the groups."""

    targets: dict[str, EngineScheme]
    ignore: list[str]
    fused: Fused
    patterns: Patterns

    @classmethod
    def read(
        cls, quantization: Mapping[str, Any], renames: Renames, fused: Fused, patterns: Patterns
    ) -> CompressedTensors:
        """CompressedTensorsConfig.from_config, then apply_vllm_mapper. Raises Refused where they raise."""
        groups = quantization.get("config_groups", {})
        if not isinstance(groups, dict):
            raise NotLoadable(f"config_groups is {shorten(groups)}, and no mapping")
        targets: dict[str, EngineScheme] = {}
        for label, group in groups.items():
            where = f"config_groups[{shorten(label)}]"
            names = group.get("targets") if isinstance(group, dict) else None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise NotLoadable(f"{where} has no list of targets")
            if len(names) == 1 and names[0].endswith("Attention"):
                continue  # goes with the KV cache
            scheme = _scheme(group, quantization.get("format"), where)
            targets |= {_renamed(name, renames): scheme for name in names}
        ignore = quantization.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise NotLoadable(f"ignore is {shorten(ignore)}, and no list of names")
        if _sparse(quantization.get("sparsity_config")):
            raise NotLoadable("sparsity_config has targets, which vLLM no longer takes")
        return cls(targets, [_renamed(name, renames) for name in ignore], fused, patterns)

    def scheme(self, layer: Layer) -> EngineScheme:
        """CompressedTensorsConfig.get_quant_method; for experts CompressedTensorsMoEMethod.get_moe_method."""
        if layer.kind == EXPERTS:
            targets = dict(self.targets)
            if "Linear" in targets:
                targets.setdefault("RoutedExperts", targets["Linear"])
            schemes = [self._of(f"{layer.name}.0.{part}", layer.cls, targets) for part in EXPERT_PARTS]
            if any(scheme != schemes[0] for scheme in schemes):
                raise NotLoadable(f"config_groups and ignore treat the projections of {layer.name} differently")
            return schemes[0]
        return self._of(layer.name, layer.cls, self.targets)

    def _of(self, name: str, cls: str, targets: Mapping[str, EngineScheme]) -> EngineScheme:
        if self._ignored(name):
            return EngineScheme(because="ignore")
        target = self._first(name, targets) or self._fused(name, targets) or self._class(cls, targets)
        return EngineScheme(because="config_groups") if target is None else targets[target]

    def _ignored(self, name: str) -> bool:
        """should_ignore_layer: a match of the fused name itself goes before its parts. Every pattern is tried."""
        if self._listed(name):
            return True
        parts = expand(name, self.fused)
        return parts != [name] and agreed(name, [self._listed(part) for part in parts], "ignore")

    def _listed(self, name: str) -> bool:
        return bool([target for target in self.ignore if self._matches(name, target)])

    def _first(self, name: str, targets: Iterable[str]) -> str | None:
        return next((t for t in targets if self._matches(name, t)), None)

    def _fused(self, name: str, targets: Mapping[str, EngineScheme]) -> str | None:
        """_match_fused_layer: the target of the first part, if all parts have one."""
        whole = next((key for key in self.fused if name.endswith(key)), None)
        if whole is None:
            return None
        found = [self._first(name.replace(whole, part), targets) for part in self.fused[whole]]
        return found[0] if all(found) else None

    def _class(self, cls: str, targets: Mapping[str, EngineScheme]) -> str | None:
        for target in targets:
            if self._matches(cls, target) if target.startswith("re:") else target.lower() in cls.lower():
                return target
        return None

    def _matches(self, name: str, target: str) -> bool:
        return self.patterns.match(target[3:], name) if target.startswith("re:") else target == name


@dataclass(frozen=True)
class Fp8:
    """A config of quant_method fp8, as DeepSeek and Qwen publish it."""

    ignored: list[str]
    fused: Fused

    @classmethod
    def read(cls, quantization: Mapping[str, Any], renames: Renames, fused: Fused) -> Fp8:
        """Fp8Config.from_config, then apply_vllm_mapper. Raises Refused where they raise."""
        activation = required(quantization, "activation_scheme")
        if activation not in ("static", "dynamic"):
            raise NotLoadable(f"activation_scheme is {shorten(activation)}; it takes static or dynamic")
        block = quantization.get("weight_block_size")
        if block is not None and (not isinstance(block, list) or len(block) != 2 or activation != "dynamic"):
            raise NotLoadable(f"weight_block_size is {shorten(block)} with activation_scheme {activation}")
        ignored = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or []
        return cls(renames.of_list(ignored, "ignored_layers"), fused)

    def scheme(self, layer: Layer) -> EngineScheme:
        """Fp8Config.get_quant_method."""
        if layer.kind == LM_HEAD or self._skipped(layer.name):
            return EngineScheme(because="ignored_layers")
        return EngineScheme(SCALED, 8, None, True, "ignored_layers")

    def _skipped(self, name: str) -> bool:
        """is_layer_skipped, exact; a layer with `experts` in its name is skipped with any of its parts."""
        leaf = name.rpartition(".")[2]
        if leaf in self.fused and name in self.ignored:
            return True
        if leaf in self.fused:
            return agreed(name, [part in self.ignored for part in expand(name, self.fused)], "ignored_layers")
        if "experts" in name:
            return any(name in ignored for ignored in self.ignored if "experts" in ignored)
        return name in self.ignored


def _renamed(target: str, renames: Renames) -> str:
    """Only what looks like a path is renamed: no pattern, no class."""
    return renames.of(target, "ignore") if "." in target and not target.startswith("re:") else target


def _scheme(group: Mapping[str, Any], general: Any, where: str) -> EngineScheme:
    weights, form = group.get("weights"), group.get("format") or general
    if not isinstance(weights, dict):
        raise NotLoadable(f"{where} has no weights")
    if not (form is None or isinstance(form, str)):
        raise NotLoadable(f"{where} has format {shorten(form)}")
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    if type(bits) is not int or not (size is None or type(size) is int):
        raise NotLoadable(f"{where} has num_bits {shorten(bits)} and group_size {shorten(size)}")
    if weights.get("actorder") in ("group", "dynamic", True):  # True stands for group
        raise NotLoadable(f"{where} has actorder {weights['actorder']!r}, which vLLM no longer takes")
    storage = COMPRESSED if form in PACKED_FORMATS else SCALED
    if storage == COMPRESSED and bits not in WNA16_BITS:
        raise NotLoadable(f"{where} has num_bits {bits}")
    return EngineScheme(storage, bits, size, weights.get("symmetric", True), where)


def _sparse(sparsity: Any) -> bool:
    return isinstance(sparsity, dict) and bool(sparsity.get("targets"))
