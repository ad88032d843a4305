"""Quark checkpoints, as vLLM reads them: which layers are quantized, and not by which of Quark's schemes.

Source: vLLM 0.32.0, model_executor/layers/quantization/quark/quark.py (QuarkConfig.from_config, apply_vllm_mapper,
get_quant_method_target) and quark/utils.py (should_ignore_layer). Compared with these by
tests/engines/test_rules_of_vllm.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from requant.tasks.checkpoint.compat.compressed import IgnoreList
from requant.tasks.checkpoint.compat.rule import (
    EXPERTS,
    LM_HEAD,
    SCALED,
    EngineScheme,
    Fused,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    shorten,
)
from requant.tasks.checkpoint.config import QuantizationConfig


@dataclass(frozen=True)
class Quark:
    """A config of Quark. `excluded`: names and patterns of the layers that are not quantized."""

    excluded: IgnoreList

    @classmethod
    def read(cls, quantization: QuantizationConfig, renames: Renames, fused: Fused, patterns: Patterns) -> Quark:
        """Read a config as from_config and apply_vllm_mapper do. Raises NotLoadable if they raise."""
        export = quantization.get("export")
        if not isinstance(export, dict):
            raise NotLoadable(f"export is {shorten(export)}, and no mapping")
        if not isinstance(export.get("kv_cache_group"), list):
            raise NotLoadable(f"export.kv_cache_group is {shorten(export.get('kv_cache_group'))}, and no list")
        excluded = renames.of_list(quantization.get("exclude"), "exclude")
        return cls(IgnoreList(excluded, "exclude", fused, patterns))

    def scheme(self, layer: Layer) -> EngineScheme:
        """Decide as get_quant_method_target does. Experts are all left out if one of their parts is."""
        below = f"{layer.name}."
        names = self.excluded.entries if layer.kind == EXPERTS else []
        if any(name == layer.name or name.startswith(below) for name in names) or self.excluded.includes(layer.name):
            return EngineScheme(because="exclude")
        if layer.kind == LM_HEAD:  # whether it is left out is asked all the same, and may raise
            return EngineScheme(because="vLLM does not quantize lm_head with Quark")
        return EngineScheme(SCALED, None, None, True, "exclude")
