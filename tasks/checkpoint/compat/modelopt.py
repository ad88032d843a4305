"""ModelOpt checkpoints (FP8, NVFP4, MXFP8, and several of them mixed), as vLLM reads them.

Source: vLLM 0.32.0, model_executor/layers/quantization/modelopt.py (ModelOptQuantConfigBase.from_config,
is_layer_excluded, apply_vllm_mapper; ModelOptMixedPrecisionConfig._resolve_quant_algo; LINEAR_ALGOS) and
transformers_utils/model_arch_config_convertor.py (_normalize_quantization_config). Compared with these classes by
tests/engines/test_rules_of_vllm.py.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from requant.tasks.checkpoint.compat.compressed import skipped_exactly
from requant.tasks.checkpoint.compat.rule import (
    EXPERTS,
    SCALED,
    EngineScheme,
    Fused,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    Substrings,
    shorten,
)
from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig

FP8 = frozenset({"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"})
NVFP4 = frozenset({"NVFP4", "W4A16_NVFP4"})
MIXED = "MIXED_PRECISION"
LINEAR_ALGOS = {**dict.fromkeys(FP8, 8), **dict.fromkeys(NVFP4, 4), "MXFP8": 8}  # bits of a weight
EXPERT_ALGOS = {"FP8": 8, "FP8_PB_WO": 8, "FP8_BLOCK_SCALES": 8, **dict.fromkeys(NVFP4, 4), "MXFP8": 8}  # if mixed
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TOWERS = ("vision_tower", "vision_model", "vit_large_projector")  # never quantized
REQUIRED = {  # fields of the nested form
    **dict.fromkeys(NVFP4, ("group_size", "kv_cache_quant_algo", "exclude_modules")),
    "MXFP8": ("kv_cache_quant_algo", "exclude_modules"),
}


@dataclass(frozen=True)
class Algorithms:
    """The algorithms of mixed layers by name, and for each parent of such a layer that of its first one."""

    of_layers: dict[str, str]
    of_parents: dict[str, str]

    @classmethod
    def read(cls, values: JsonObject, renames: Renames) -> Algorithms:
        """Read `quantized_layers`. Raises NotLoadable where vLLM would raise."""
        layers = values.get("quantized_layers")
        if not isinstance(layers, dict) or not layers:
            raise NotLoadable("quant_algo is MIXED_PRECISION, and there are no quantized_layers")
        of_layers: dict[str, str] = {}
        of_parents: dict[str, str] = {}
        for stated, layer in layers.items():
            algorithm = layer.get("quant_algo") if isinstance(layer, dict) else None
            if not isinstance(algorithm, str):
                raise NotLoadable(f"quantized_layers[{shorten(stated)}] is {shorten(layer)}, and has no quant_algo")
            name = renames.of(stated, "quantized_layers")
            of_layers[name] = algorithm.upper()
        for name, algorithm in of_layers.items():
            for at, character in enumerate(name):
                if character == ".":
                    of_parents.setdefault(name[:at], algorithm)
        return cls(of_layers, of_parents)

    def of(self, name: str, fused: Fused) -> str | None:
        """Return the algorithm of a layer, as _resolve_quant_algo does; None if no entry is for it."""
        names = list(_candidates(name))
        stem, _, leaf = name.rpartition(".")
        parents = [*names, *([name.rsplit(".experts", 1)[0]] if name.endswith(".experts") else [])]
        found = (
            next((self.of_layers[one] for one in names if one in self.of_layers), None)
            or self._shared(name, [f"{base}.{part}" for base in _candidates(stem) for part in fused.get(leaf, ())])
            or next((self.of_parents[one] for one in parents if one in self.of_parents), None)
        )
        for one in () if found else names:
            found = found or self._shared(name, [f"{one.rpartition('.')[0]}.{part}" for part in FUSED.get(leaf, ())])
        return found

    def _shared(self, name: str, parts: list[str]) -> str | None:
        found = {self.of_layers[part] for part in parts if part in self.of_layers}
        if len(found) > 1:
            raise NotLoadable(
                f"quantized_layers treats the parts of {name} differently, which are one layer in the engine"
            )
        return next(iter(found), None)


@dataclass(frozen=True)
class ModelOpt:
    """A config of ModelOpt. `mixed`: the algorithms of the layers, if they are mixed; otherwise None."""

    algorithm: str
    mixed: Algorithms | None
    excluded: list[str]
    parts_of_names: Substrings
    where: str
    fused: Fused
    patterns: Patterns

    @classmethod
    def read(cls, quantization: QuantizationConfig, renames: Renames, fused: Fused, patterns: Patterns) -> ModelOpt:
        """Read a config as from_config and apply_vllm_mapper do. Raises NotLoadable if they raise."""
        quantization = _as_modelopt(quantization)
        nested = "quantization" in quantization
        values = quantization.child("quantization") if nested else quantization
        if values is None:
            raise NotLoadable(f"quantization is {shorten(quantization['quantization'])}, and no mapping")
        where = "exclude_modules" if nested else "ignore"
        excluded = values.get(where, [])
        if not isinstance(excluded, list):
            raise NotLoadable(f"{where} is {shorten(excluded)}, and no list of names")
        algorithm = str(values.get("quant_algo") or "").upper()
        _check(algorithm, quantization.method, values if nested else None)
        _check_numbers(values, nested)
        if renames.prefixes:  # only then does vLLM rename anything
            excluded = renames.of_list([part for name in excluded for part in _tree(name)], where)
        elif not all(isinstance(name, str) for name in excluded):
            raise NotLoadable(f"{where} is {shorten(excluded)}, and no list of names")
        mixed = Algorithms.read(values, renames) if algorithm == MIXED else None
        return cls(algorithm, mixed, excluded, Substrings.of(excluded), where, fused, patterns)

    def scheme(self, layer: Layer) -> EngineScheme:
        """Decide as get_quant_method does."""
        if self._excluded(layer.name):
            return EngineScheme(because=self.where)
        if self.mixed is not None:
            known = EXPERT_ALGOS if layer.kind == EXPERTS else LINEAR_ALGOS
            bits = known.get(self.mixed.of(layer.name, self.fused) or "")
            return self._scaled(bits, "quantized_layers") if bits else EngineScheme(because="quantized_layers")
        if any(tower in layer.name for tower in TOWERS):
            return EngineScheme(because="it is a part of the vision tower")
        return self._scaled(LINEAR_ALGOS[self.algorithm], self.where)

    def _scaled(self, bits: int, because: str) -> EngineScheme:
        return EngineScheme(SCALED, bits, None, True, because)

    def _excluded(self, name: str) -> bool:
        """Decide as is_layer_excluded does: exact names, then parts of names, then wildcards."""
        if not self.excluded:
            return False
        if skipped_exactly(name, self.excluded, self.fused, self.where):
            return True
        if self.parts_of_names.within(name):
            return True
        wildcards = (pattern for pattern in self.excluded if not {*"*?["}.isdisjoint(pattern))
        return any(self.patterns.match(fnmatch.translate(pattern), name) for pattern in wildcards)


def _as_modelopt(quantization: QuantizationConfig) -> QuantizationConfig:
    """Return a config in the form of ModelOpt; MiniMax writes `mxfp8` with `ignored_layers`."""
    if "quantization" in quantization or quantization.get("quant_algo") or quantization.method != "mxfp8":
        return quantization
    inner = {
        "quant_algo": "MXFP8",
        "kv_cache_quant_algo": quantization.get("kv_cache_quant_algo"),
        "exclude_modules": quantization.get("ignored_layers", []) or [],
    }
    return QuantizationConfig({"quant_method": "modelopt_mxfp8", "quantization": inner})


def _check(algorithm: str, method: str, nested: JsonObject | None) -> None:
    """Check the algorithm as from_config and the class that vLLM picks do. Raises NotLoadable.

    The class is picked by the algorithm, or by `quant_method` for the FP8 formats that no class asks for by name
    (override_quantization_method).
    """
    if not algorithm:
        raise NotLoadable("quant_algo is missing")
    known = {*LINEAR_ALGOS, MIXED}
    by_method = algorithm in FP8 - {"FP8"} and method != "modelopt"
    if algorithm not in known or by_method or (method == "mxfp8" and algorithm != "MXFP8"):
        raise NotLoadable(f"quant_algo is {shorten(algorithm)}, which vLLM does not take with quant_method {method}")
    missing = [field for field in REQUIRED.get(algorithm, ()) if nested is not None and field not in nested]
    if missing:
        raise NotLoadable(f"quantization has no {missing[0]}")


def _check_numbers(values: JsonObject, nested: bool) -> None:
    """Check the other fields as from_config does. Raises NotLoadable."""
    size, cache = values.get("group_size"), values.get("kv_cache_quant_algo") if nested else None
    try:
        int(0 if size is None else size)
    except (TypeError, ValueError, OverflowError) as error:
        raise NotLoadable(f"group_size is {shorten(size)}") from error
    if cache is not None and not isinstance(cache, str):
        raise NotLoadable(f"kv_cache_quant_algo is {shorten(cache)}")


def _tree(name: object) -> list[object]:
    """Return `path*` as the two patterns that vLLM makes of it."""
    if isinstance(name, str) and len(name) >= 2 and name[-1] == "*" and name[-2] != ".":
        return [name[:-1], f"{name[:-1]}.*"]
    return [name]


def _candidates(name: str) -> Iterator[str]:
    """Yield the names under which vLLM looks a layer up."""
    yield name
    if name.endswith(".lm_head"):
        yield "lm_head"
    wrapped, inner = "model.language_model.", "language_model.model."
    if name.startswith(inner):
        yield wrapped + name[len(inner) :]
    elif name.startswith(wrapped):
        yield inner + name[len(wrapped) :]
