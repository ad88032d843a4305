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
from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig
from requant.tasks.checkpoint.modules import Storage

PACKED_FORMATS = {"pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "marlin-24"}
WNA16_BITS = {2, 3, 4, 5, 6, 7, 8}
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


def matches(name: str, target: str, patterns: Patterns) -> bool:
    """Check whether a target is a name, or with `re:` a regular expression that matches it."""
    return patterns.match(target[3:], name) if target.startswith("re:") else target == name


@dataclass(frozen=True)
class IgnoreList:
    """Names and patterns of layers that are not quantized. `where`: the field of the config."""

    entries: list[str]
    where: str
    fused: Fused
    patterns: Patterns

    def includes(self, name: str) -> bool:
        """Decide as should_ignore_layer does: a match of the fused name precedes its parts. Every pattern is tried.

        Raises NotLoadable if the list treats the parts of a fused layer differently.
        """
        if self._listed(name):
            return True
        parts = expand(name, self.fused)
        return parts != [name] and agreed(name, [self._listed(part) for part in parts], self.where)

    def _listed(self, name: str) -> bool:
        return bool([target for target in self.entries if matches(name, target, self.patterns)])


@dataclass(frozen=True)
class CompressedTensors:
    """A config of compressed-tensors: schemes by target, in the order of the groups."""

    targets: dict[str, EngineScheme]
    ignored: IgnoreList
    fused: Fused
    patterns: Patterns

    @classmethod
    def read(
        cls, quantization: QuantizationConfig, renames: Renames, fused: Fused, patterns: Patterns
    ) -> CompressedTensors:
        """Read a config as CompressedTensorsConfig.from_config and apply_vllm_mapper do.

        Raises NotLoadable if they raise.
        """
        rule = cls.of(quantization, renames, fused, patterns)
        for label, group in (quantization.get("config_groups") or {}).items():
            where = f"config_groups[{shorten(label)}]"
            if not _is_kv_cache(group["targets"]):
                _check_kernels(group["weights"], group.get("format") or quantization.get("format"), where)
        if _sparse(quantization.get("sparsity_config")):
            raise NotLoadable("sparsity_config has targets, which vLLM no longer takes")
        return rule

    @classmethod
    def of(
        cls, quantization: QuantizationConfig, renames: Renames, fused: Fused, patterns: Patterns
    ) -> CompressedTensors:
        """Read what a config says of layers, whether vLLM has kernels for it or not.

        Raises NotLoadable for fields of the wrong type, and groups without targets or weights.
        """
        groups = quantization.get("config_groups", {})
        if not isinstance(groups, dict):
            raise NotLoadable(f"config_groups is {shorten(groups)}, and no mapping")
        targets: dict[str, EngineScheme] = {}
        for label, group in groups.items():
            where = f"config_groups[{shorten(label)}]"
            group = JsonObject(group if isinstance(group, dict) else {})
            names = group.get("targets")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise NotLoadable(f"{where} has no list of targets")
            if _is_kv_cache(names):
                continue
            scheme = _scheme(group, quantization.get("format"), where)
            targets |= {_renamed(name, renames): scheme for name in names}
        ignore = quantization.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise NotLoadable(f"ignore is {shorten(ignore)}, and no list of names")
        names = [_renamed(name, renames) for name in ignore]
        return cls(targets, IgnoreList(names, "ignore", fused, patterns), fused, patterns)

    def scheme(self, layer: Layer) -> EngineScheme:
        """Decide as CompressedTensorsConfig.get_quant_method does.

        For experts, CompressedTensorsMoEMethod.get_moe_method decides.
        """
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
        if self.ignored.includes(name):
            return EngineScheme(because="ignore")
        target = self._first(name, targets) or self._fused(name, targets) or self._class(cls, targets)
        return EngineScheme(because="config_groups") if target is None else targets[target]

    def _first(self, name: str, targets: Iterable[str]) -> str | None:
        return next((t for t in targets if matches(name, t, self.patterns)), None)

    def _fused(self, name: str, targets: Mapping[str, EngineScheme]) -> str | None:
        """Return the target of the first part, if all parts have one, as _match_fused_layer does."""
        fused_name = next((key for key in self.fused if name.endswith(key)), None)
        if fused_name is None:
            return None
        matches = [self._first(name.replace(fused_name, part), targets) for part in self.fused[fused_name]]
        return matches[0] if all(matches) else None

    def _class(self, cls: str, targets: Mapping[str, EngineScheme]) -> str | None:
        for target in targets:
            if matches(cls, target, self.patterns) if target.startswith("re:") else target.lower() in cls.lower():
                return target
        return None


@dataclass(frozen=True)
class Fp8:
    """A config of the method fp8, as DeepSeek and Qwen publish it."""

    ignored: list[str]
    fused: Fused

    @classmethod
    def read(cls, quantization: QuantizationConfig, renames: Renames, fused: Fused) -> Fp8:
        """Read a config as Fp8Config.from_config and apply_vllm_mapper do. Raises NotLoadable if they raise."""
        rule = cls.of(quantization, renames, fused)
        activation = required(quantization, "activation_scheme")
        if activation not in ("static", "dynamic"):
            raise NotLoadable(f"activation_scheme is {shorten(activation)}; it takes static or dynamic")
        block = quantization.get("weight_block_size")
        if block is not None and (not isinstance(block, list) or len(block) != 2 or activation != "dynamic"):
            raise NotLoadable(f"weight_block_size is {shorten(block)} with activation_scheme {activation}")
        return rule

    @classmethod
    def of(cls, quantization: QuantizationConfig, renames: Renames, fused: Fused) -> Fp8:
        """Read which layers a config leaves out. Raises NotLoadable if that is no list of names."""
        ignored = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or []
        return cls(renames.of_list(ignored, "ignored_layers"), fused)

    def scheme(self, layer: Layer) -> EngineScheme:
        """Decide as Fp8Config.get_quant_method does."""
        if layer.kind == LM_HEAD or self._skipped(layer.name):
            return EngineScheme(because="ignored_layers")
        return EngineScheme(SCALED, 8, None, True, "ignored_layers")

    def _skipped(self, name: str) -> bool:
        return skipped_exactly(name, self.ignored, self.fused, "ignored_layers")


def skipped_exactly(name: str, ignored: list[str], fused: Fused, where: str) -> bool:
    """Decide as is_layer_skipped does: names match exactly, but experts are skipped if one of their parts is.

    Raises NotLoadable if the list, the field `where`, treats the parts of a fused layer differently.
    """
    leaf = name.rpartition(".")[2]
    if leaf in fused and name in ignored:
        return True
    if leaf in fused:
        return agreed(name, [part in ignored for part in expand(name, fused)], where)
    if "experts" in name:
        return any(name in one for one in ignored if "experts" in one)
    return name in ignored


def _renamed(target: str, renames: Renames) -> str:
    """Rename a target that is a path; patterns and classes stay."""
    return renames.of(target, "ignore") if "." in target and not target.startswith("re:") else target


def _scheme(group: JsonObject, general: Any, where: str) -> EngineScheme:
    weights, form = group.get("weights"), group.get("format") or general
    if not isinstance(weights, dict):
        raise NotLoadable(f"{where} has no weights")
    if not (form is None or isinstance(form, str)):
        raise NotLoadable(f"{where} has format {shorten(form)}")
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    if type(bits) is not int or not (size is None or type(size) is int):
        raise NotLoadable(f"{where} has num_bits {shorten(bits)} and group_size {shorten(size)}")
    storage: Storage = COMPRESSED if form in PACKED_FORMATS else SCALED
    return EngineScheme(storage, bits, size, weights.get("symmetric", True), where)


def _check_kernels(weights: JsonObject, form: Any, where: str) -> None:
    if weights.get("actorder") in ("group", "dynamic", True):  # True means group
        raise NotLoadable(f"{where} has actorder {weights['actorder']!r}, which vLLM no longer takes")
    if form in PACKED_FORMATS and weights.get("num_bits", 8) not in WNA16_BITS:
        raise NotLoadable(f"{where} has num_bits {weights.get('num_bits')}")


def _is_kv_cache(targets: list[str]) -> bool:
    """Check whether the targets of a group are those of a scheme of the KV cache."""
    return len(targets) == 1 and targets[0].endswith("Attention")


def _sparse(sparsity: Any) -> bool:
    return isinstance(sparsity, dict) and bool(sparsity.get("targets"))
