"""auto-round checkpoints, as vLLM reads them.

Source: vLLM 0.32.0, model_executor/layers/quantization/inc/inc.py (INCConfig) and inc/config_parser.py
(INCConfigParser). Compared with these classes by tests/engines/test_rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from requant.tasks.checkpoint.compat.rule import (
    COMPRESSED,
    EXPERTS,
    INTEGER,
    LM_HEAD,
    SCALED,
    EngineScheme,
    Fused,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    SchemeValues,
    mapping,
    required,
    shorten,
)
from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig
from requant.tasks.checkpoint.modules import Storage

BITS = {2, 3, 4, 5, 6, 7, 8}
# Group sizes besides -1 that the Marlin kernels of vLLM and SGLang take.
GROUP_SIZES = (128, 64, 32)
GPTQ, AWQ, FP8, MXFP = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:fp8", "auto_round:llm_compressor"
PACKINGS = {GPTQ, AWQ, FP8, MXFP}
BACKENDS = {"auto", "gptq", "gptq:marlin", "awq", "awq:marlin", "marlin"}
DATA_TYPES = {"int", "mx_fp", "fp"}
MARKS = frozenset(r"*+?^$()[]{}|\\")  # a key of extra_config with one of these characters is a regular expression
EVERYTHING = "no block_name_to_quantize: everything is quantized"


@dataclass(frozen=True)
class AutoRound:
    """A config of auto-round. `extra` and `blocks` have the engine's names.

    `keys`: those keys of `extra` that are regular expressions.
    """

    bits: Any
    group_size: Any
    sym: Any
    packing: str
    backend: str
    data_type: str
    blocks: list[str] | None
    extra: JsonObject
    fused: Fused
    patterns: Patterns
    keys: tuple[str, ...] = ()

    @classmethod
    def read(cls, quantization: QuantizationConfig, renames: Renames, fused: Fused, patterns: Patterns) -> AutoRound:
        """Read a config as INCConfig.from_config and apply_vllm_mapper do. Raises NotLoadable if they raise."""
        rule = cls.of(quantization, renames, fused, patterns)
        _one_of("bits", rule.bits, BITS)
        if "mx_fp" not in rule.data_type:
            _one_of("data_type", rule.data_type, DATA_TYPES)
        _one_of("packing_format", rule.packing, PACKINGS)
        _one_of("backend", rule.backend, BACKENDS)
        values = SchemeValues(rule.bits, rule.group_size, rule.sym)
        _check_together(quantization, rule.data_type, values, rule.packing, rule.backend)
        return rule

    @classmethod
    def of(cls, quantization: QuantizationConfig, renames: Renames, fused: Fused, patterns: Patterns) -> AutoRound:
        """Read what a config says of layers, whether vLLM has kernels for it or not.

        Raises NotLoadable for fields of the wrong type.
        """
        data_type = quantization.get("data_type", "int")
        data_type = "fp" if data_type == "fp8" else data_type
        bits = required(quantization, "bits")
        group_size = normal_group(required(quantization, "group_size"))
        packing = quantization.get("packing_format")
        backend = next((quantization[key] for key in ("backend", "vllm_backend") if key in quantization), "auto")
        sym = quantization.get("sym", True)
        if not isinstance(data_type, str):
            raise NotLoadable(f"data_type is {shorten(data_type)}")
        if packing is None:
            packing = default_packing(data_type, bits, group_size)
        blocks = next(
            (quantization[key] for key in ("block_name_to_quantize", "to_quant_block_names") if key in quantization),
            None,
        )
        if blocks is not None:
            blocks = renames.of_list(blocks.split(",") if isinstance(blocks, str) else blocks, "block_name_to_quantize")
        extra = mapping(quantization, "extra_config")
        named = JsonObject({renames.of(key, "extra_config"): value for key, value in extra.items()})
        keys = tuple(key for key in named if not MARKS.isdisjoint(key))
        return cls(bits, group_size, sym, packing, backend, data_type, blocks, named, fused, patterns, keys)

    def scheme(self, layer: Layer) -> EngineScheme:
        """Decide as INCConfig.get_quant_method does, for which an exact entry without bits is one of 16 bits."""
        for key in (layer.name, f"model.{layer.name}"):
            if key in self.extra and _at_least_16(self._entry(key).get("bits", 16), key):
                return EngineScheme(because=f"extra_config[{key!r}]")
        return self._stated(layer)

    def _stated(self, layer: Layer) -> EngineScheme:
        (bits, group_size, sym), because = self._resolve(layer)
        if _at_least_16(bits, layer.name):
            return EngineScheme(because=because)
        storage: Storage = INTEGER if self.data_type == "int" else SCALED
        # weight_packed and weight_scale: inc/schemes/inc_mxfp4_linear.py; auto-round 0.16.1 writes nv_fp alike.
        if bits == 4 and ("mx_fp" in self.data_type or "nv_fp" in self.data_type):
            storage = COMPRESSED
        return EngineScheme(storage, bits, group_size, sym, because, "awq" if self.packing == AWQ else "gptq")

    def _resolve(self, layer: Layer) -> tuple[SchemeValues, str]:
        """Decide as INCConfigParser._resolve_raw does."""
        name = layer.name
        if name in self.extra:
            return self._values(name, True), f"extra_config[{name!r}]"
        suffix = self._suffix(name)
        if suffix is not None:
            return self._values(suffix, True), f"extra_config[{suffix!r}]"
        quantized, because = layer.kind != LM_HEAD, EVERYTHING
        if self.blocks:
            quantized, because = name.startswith(tuple(self.blocks)), "block_name_to_quantize"
        if self.extra and "fusedmoe" in layer.cls.lower():  # vLLM 0.32 has no such class any more
            schemes = [self._values(key, quantized) for key in self.extra if key.startswith(name)]
            if schemes:
                return self._agreed(schemes, name), "extra_config"
        if self.extra:
            for fused_name, parts in self.fused.items():
                if name.count(fused_name) != 1:
                    continue
                names = [name.replace(fused_name, part) for part in parts]
                if any(self._explicit(n) for n in names):
                    return self._agreed([self._values(n, quantized) for n in names], name), "extra_config"
        key = self._matching_key(name) if self.extra else None
        return self._values(name, quantized), because if key is None else f"extra_config[{shorten(key)}]"

    def _suffix(self, name: str) -> str | None:
        """Return the first key, in the order of the file, that the name ends with after a dot."""
        tails = {name[at + 1 :] for at, c in enumerate(name) if c == "."} & self.extra.keys()
        if len(tails) < 2:
            return next(iter(tails), None)
        return next(key for key in self.extra if key in tails)

    def _explicit(self, name: str) -> bool:
        return name in self.extra or self._matching_key(name) is not None

    def _matching_key(self, name: str) -> str | None:
        return self.patterns.first("search", self.keys, name)  # vLLM passes over invalid ones too.

    def _values(self, name: str, quantized: bool) -> SchemeValues:
        values = SchemeValues(self.bits, self.group_size, self.sym) if quantized else SchemeValues(16, -1, True)
        key = name if name in self.extra else self._matching_key(name)
        if key is None:
            return values
        entry = self._entry(key)
        group_size = normal_group(entry.get("group_size", values.group_size))
        return SchemeValues(entry.get("bits", values.bits), group_size, entry.get("sym", values.sym))

    def _entry(self, key: str) -> JsonObject:
        entry = self.extra.child(key)
        if entry is None:
            raise NotLoadable(f"extra_config[{shorten(key)}] is {shorten(self.extra[key])}, and no mapping")
        return entry

    def _agreed(self, schemes: list[SchemeValues], name: str) -> SchemeValues:
        if any(values != schemes[0] for values in schemes):
            raise NotLoadable(f"extra_config treats the parts of {name} differently, which are one layer in the engine")
        return schemes[0]

    def kernel_problem(self, layer: Layer, scheme: EngineScheme) -> str | None:
        """Return why no CUDA kernel takes this scheme, or None.

        Sources: inc/schemes/inc_wna16_scheme.py and inc_wna16_linear.py.
        """
        if not scheme.quantized or scheme.storage != INTEGER or layer.kind == EXPERTS:
            return None
        gptq = "gptq" in self.packing or "gptq" in self.backend
        if scheme.bits in (2, 3, 5, 6, 7):
            return None  # vLLM uses its humming kernel
        known = scheme.bits in (4, 8) and scheme.sym is True if gptq else scheme.bits == 4
        if known and (not gptq or scheme.group_size in (-1, *GROUP_SIZES)):
            return None
        return (
            f"bits={scheme.bits!r}, group_size={scheme.group_size!r}, sym={scheme.sym!r} has no kernel ({layer.name})"
        )


@dataclass(frozen=True)
class AsQuantized(AutoRound):
    """A config of auto-round, as auto-round writes it: an entry has only those values that differ from the others'.

    Source: auto_round 0.16.1, export/export_to_autoround/export.py.
    """

    matched: dict[str, str | None] = field(default_factory=dict, repr=False)

    def scheme(self, layer: Layer) -> EngineScheme:
        """Return how a layer was quantized, whatever vLLM makes of it."""
        return self._stated(layer)

    def _matching_key(self, name: str) -> str | None:
        if name not in self.matched:
            self.matched[name] = super()._matching_key(name)
        return self.matched[name]


def normal_group(group: Any) -> Any:
    """Return a group size: an integer, or a tuple of two. Raises NotLoadable for anything else."""
    if isinstance(group, list | tuple):
        if len(group) != 2 or not all(isinstance(side, int) for side in group):
            raise NotLoadable(f"group_size is {shorten(group)}")
        return tuple(group)
    if not isinstance(group, int):
        raise NotLoadable(f"group_size is {shorten(group)}")
    return group


def default_packing(data_type: str, bits: Any, group_size: Any) -> str:
    """Return the packing of a config that states none."""
    if data_type == "fp" and bits == 8 and isinstance(group_size, tuple):
        return FP8
    return MXFP if "mx_fp" in data_type else GPTQ


def _one_of(field_name: str, value: Any, known: set[Any]) -> None:
    if not isinstance(value, str | int) or value not in known:
        raise NotLoadable(f"{field_name} is {shorten(value)}; it takes {', '.join(map(str, sorted(known)))}")


def _at_least_16(bits: Any, name: str) -> bool:
    if not isinstance(bits, int | float):
        raise NotLoadable(f"the bits of {name} are {shorten(bits)}")
    return bits >= 16


def _check_together(
    quantization: QuantizationConfig, data_type: str, values: SchemeValues, packing: str, backend: str
) -> None:
    """Check a config as INCConfig._validate_supported_quantization and _validate_raw_config do."""
    bits, group_size, sym = values
    if data_type == "int":
        if isinstance(group_size, tuple) or packing not in (GPTQ, AWQ):
            raise NotLoadable(f"data_type int with group_size {group_size!r} and packing_format {packing!r}")
    elif data_type == "fp":
        if not (bits == 8 and isinstance(group_size, tuple) and sym and packing == FP8 and backend == "auto"):
            raise NotLoadable(f"data_type fp takes blocks of 8 bits in {FP8}, symmetric, backend auto")
        _expect(
            quantization, act_bits=8, act_group_size=group_size[0], act_data_type="fp", act_sym=True, act_dynamic=True,
            activation_scheme="dynamic", fmt="e4m3",
        )  # fmt: skip
    elif data_type == "mx_fp" and not (
        bits in (4, 8) and group_size == 32 and sym and packing == MXFP and backend == "auto"
    ):
        raise NotLoadable(f"data_type mx_fp takes 4 or 8 bits in groups of 32 in {MXFP}, symmetric, backend auto")
    if "mx_fp" in data_type and bits == 8:
        _expect(quantization, act_bits=8, act_data_type="mx_fp", act_group_size=32, act_sym=True, act_dynamic=True)


def _expect(quantization: QuantizationConfig, **values: Any) -> None:
    for key, value in values.items():
        if quantization.get(key, value) != value:
            raise NotLoadable(f"{key} is {shorten(quantization[key])}; it takes {value!r} only")
