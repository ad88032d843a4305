"""Reads from a quantization config how each module is stored: bits, group size, packing, or that it is not quantized.

The rules are those of vLLM 0.32 in `compat`, without the limits of its kernels: a config may describe what no engine
computes. A config names modules as the checkpoint does, or as vLLM does, which renames layers and fuses some. What it
says of a module's own name precedes what it says of vLLM's layer, and that precedes what it says of modules in general.
If the tensors are there, the first of these readings that fits their shapes counts. If none does, the config
contradicts the tensors, and the shapes say what is stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from requant.tasks.checkpoint.compat import vllm
from requant.tasks.checkpoint.compat.auto_round import AsQuantized
from requant.tasks.checkpoint.compat.compressed import CompressedTensors, Fp8
from requant.tasks.checkpoint.compat.gptq import BY_TENSORS, Awq, Gptq
from requant.tasks.checkpoint.compat.layers import Tree
from requant.tasks.checkpoint.compat.rule import (
    COMPRESSED,
    EXPERTS,
    INTEGER,
    LINEAR,
    LM_HEAD,
    EngineScheme,
    Fused,
    Layer,
    NotLoadable,
    Patterns,
    Renames,
    Rule,
    TooSlow,
    shorten,
)
from requant.tasks.checkpoint.config import ConfigScheme, JsonObject, ModelConfig, QuantizationConfig, Scalar
from requant.tasks.checkpoint.methods import AUTO_ROUND_METHODS, AWQ_METHODS, FP8_METHODS, GPTQ_METHODS
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.packing import BITS, Packing, PackingScheme, check_parts
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

# Values of packing_format, without the prefix of auto-round.
PACKINGS: dict[str, Packing] = {
    "auto_gptq": "gptq", "gptqmodel": "gptq_v2", "auto_round": "gptq_v2", "auto_awq": "awq", "gptq": "gptq",
    "gptq_v2": "gptq_v2", "awq": "awq",
}  # fmt: skip


def general_scheme(quantization: QuantizationConfig) -> PackingScheme:
    """Return how those modules are packed that the config does not name. Raises CheckpointError if it does not say."""
    stated = quantization.scheme
    return _packing_scheme(EngineScheme(INTEGER, stated.bits, stated.group_size), packing_of(quantization), "modules")


def packing_of(quantization: QuantizationConfig) -> Packing:
    """Return how a checkpoint with this config packs. Raises CheckpointError for a way that Requant does not know."""
    method, stated = quantization.method, quantization.get("packing_format")
    if method in AUTO_ROUND_METHODS:
        name = "auto_gptq" if stated is None else str(stated).removeprefix("auto_round:")
    elif method in GPTQ_METHODS:
        name = "gptq_v2" if quantization.get("checkpoint_format") == "gptq_v2" else "gptq"
    else:
        name = "awq" if method in AWQ_METHODS else ""
    if name not in PACKINGS:
        what = f"packing {shown(repr(stated))} of " if stated is not None else ""
        raise CheckpointError(f"{what}quant_method {_method(quantization)} is not known to Requant")
    return PACKINGS[name]


@dataclass(frozen=True)
class Contradiction:
    """What the tensors of a module are, and what the config is instead, as parts of a sentence."""

    module: str
    tensors: str
    config: str

    def __str__(self) -> str:
        return f"{self.module}: {self.tensors}, and quantization_config {self.config}"


@dataclass(frozen=True)
class Reading:
    """A quantization config, read for the modules of one checkpoint. `tree`: how vLLM names the layers."""

    quantization: QuantizationConfig
    tree: Tree = field(default_factory=Tree)
    _patterns: Patterns = field(default_factory=Patterns, repr=False)
    _answers: dict[tuple[str, str, str], EngineScheme | NotLoadable] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, config: ModelConfig, quantization: QuantizationConfig) -> Reading:
        """Take the architecture from a config, and how modules are stored from a quantization config."""
        return cls(quantization, vllm.architecture_of(config).tree)

    def stated(self, module: Module) -> EngineScheme:
        """Return how the config says that a module is stored.

        Raises CheckpointError if the config cannot be read, or is of a method for which there are no rules.
        """
        found = self._stated(module)
        if isinstance(found, EngineScheme):
            return found
        why = found or f"there are no rules for quant_method {_method(self.quantization)}"
        raise CheckpointError(f"quantization_config does not say how {module.name} is stored: {why}")

    def planned(self, module: str) -> PackingScheme:
        """Return how a module without tensors will be packed. Raises CheckpointError if the config does not say."""
        return _packing_scheme(self.stated(Module(module)), self._packing, module)

    def scheme(self, module: Module) -> PackingScheme:
        """Return how a module with the parts of GPTQ or AWQ is packed.

        Raises CheckpointError if neither the shapes of the parts nor the config say.
        """
        fitting = self._general if self._is_general(module) else self._fitting(module)
        if fitting is not None:
            return _packing_scheme(fitting, self._packing, module.name)
        found = self._by_shapes(module)
        return _packing_scheme(self.stated(module), self._packing, module.name) if found is None else found

    def bits(self, module: Module) -> int | None:
        """Return the bits of a module's packed integers; None if neither their shapes nor the config say."""
        stated = self._general if self._is_general(module) else self._fitting(module)
        if stated is None and (found := PackingScheme.of_parts(module.packed_parts)) is not None:
            return found.bits
        bits = getattr(stated or self._stated(module), "bits", None)
        return bits if type(bits) is int and 0 < bits < 16 else None

    def shared(self, modules: Iterable[Module]) -> ConfigScheme:
        """Return what all quantized modules share; None where they differ, or where neither tensors nor config say."""
        general = self.quantization.scheme
        found = set[tuple[Scalar, Scalar]]()
        for module in modules:
            if module.storage == INTEGER and not self._is_general(module):
                with contextlib.suppress(CheckpointError):
                    scheme = self.scheme(module)
                    found.add((scheme.bits, scheme.group_size))
            elif module.quantized:
                found.add((general.bits, general.group_size))
        bits, sizes = {bits for bits, _ in found}, {size for _, size in found}
        if not found:
            return general
        return ConfigScheme(_only(bits), _only(sizes), general.sym)

    def contradiction(self, module: Module) -> Contradiction | None:
        """Return how the config contradicts the shapes of a packed module; None if it does not, or if nothing is known.

        That is so for a method without rules, and for tensors that fit no scheme at all.
        """
        if module.storage not in (INTEGER, COMPRESSED) or self._fitting(module) is not None:
            return None
        if self.quantization and not self.quantization.method:
            return Contradiction(module.name, "its tensors are packed", "has no quant_method")
        stated = self._stated(module)
        if stated is None or isinstance(stated, TooSlow):
            return None
        if isinstance(stated, NotLoadable):
            return Contradiction(module.name, "its tensors are packed", f"cannot be read ({stated})")
        if module.storage == COMPRESSED:
            return Contradiction(module.name, "its tensors are packed", f"says {_told(stated)}")
        try:
            found = self._by_shapes(module)
        except CheckpointError as error:
            return Contradiction(module.name, "its tensors are packed", f"cannot be read ({error})")
        if found is None:
            return None
        layout = "awq" if found.packing == "awq" else "gptq"
        other_layout = f" in the layout of {layout}" if stated.quantized and stated.layout != layout else ""
        tensors = f"its tensors hold {found.bits} bits in {_groups(found.group_size)}{other_layout}"
        return Contradiction(module.name, tensors, f"says {_told(stated)}")

    def problem(self, module: Module, weight: tuple[int, ...]) -> str | None:
        """Return why a module with the parts of GPTQ or AWQ does not hold a weight `[out, in]` as the config says."""
        parts = module.packed_parts
        try:
            misfit = check_parts(module.name, parts, self.scheme(module), weight)
            contradiction = self.contradiction(module)
            if contradiction is None:
                return misfit
            if misfit is None:  # another scheme, and sound by itself
                return str(contradiction)
            return check_parts(module.name, parts, self.planned(module.name), weight) or misfit
        except CheckpointError as error:
            return str(error)

    def _stated(self, module: Module) -> EngineScheme | NotLoadable | None:
        """Return what the config says of a module, or why it cannot be read; None for a method without rules."""
        readings = list(self._readings(module))
        schemes = (found for found in readings if isinstance(found, EngineScheme))
        return next(schemes, readings[0] if readings else None)

    def _readings(self, module: Module) -> Iterator[EngineScheme | NotLoadable]:
        """Yield what the config says of a module, in the order in which it counts.

        vLLM has one layer for all experts of a block, and patterns are slow. So the layer is asked first where there
        are tensors, whose shapes decide, and for experts.
        """
        if self._own_rule is None:
            return
        layers = self.tree.layers([module])
        own = Layer(module.name, LM_HEAD if module.name.rpartition(".")[2] == "lm_head" else LINEAR)
        by_layer = bool(module.parts) or any(layer.kind == EXPERTS for layer in layers)
        by_layer = by_layer and module.name not in self._exact_names
        if not by_layer:
            by_name = self._answer("own", self._own_rule, own)
            by_layer = by_name == self._general
            if not by_layer:
                yield by_name
        for layer in layers:
            yield self._answer("vllm", self._vllm_rule, layer)
        if by_layer:
            yield self._answer("own", self._own_rule, own)

    def _answer(self, whose: str, rule: Rule | NotLoadable | None, layer: Layer) -> EngineScheme | NotLoadable:
        """Ask a rule about a layer, once."""
        if isinstance(rule, NotLoadable):
            return rule
        asked = whose, layer.name, layer.kind
        if asked not in self._answers:
            try:
                self._answers[asked] = rule.scheme(layer) if rule else EngineScheme()
            except NotLoadable as refusal:
                self._answers[asked] = refusal
        return self._answers[asked]

    @cached_property
    def _packing(self) -> Packing:
        return packing_of(self.quantization)

    @cached_property
    def _own_rule(self) -> Rule | NotLoadable | None:
        return self._rule(Renames(), {})

    @cached_property
    def _vllm_rule(self) -> Rule | NotLoadable | None:
        return self._rule(self.tree.renames, self.tree.fused)

    def _rule(self, renames: Renames, fused: Fused) -> Rule | NotLoadable | None:
        """Read the config; None for a method without rules. Lists that vLLM takes from the tensors are left empty."""
        quantization, method = self.quantization, self.quantization.method
        try:
            if method in AUTO_ROUND_METHODS:
                return AsQuantized.of(quantization, renames, fused, self._patterns)
            if method in GPTQ_METHODS:
                return Gptq.of(quantization, renames, fused, self._patterns, ())
            if method in AWQ_METHODS:
                return Awq.of(quantization, renames, fused, ())
            if method in FP8_METHODS:
                return Fp8.of(quantization, renames, fused)
            if method == "compressed-tensors":
                return CompressedTensors.of(quantization, renames, fused, self._patterns)
        except NotLoadable as refusal:
            return refusal
        return None

    @cached_property
    def _general(self) -> EngineScheme | None:
        """How modules are stored of which the config says nothing else; None for methods that name all modules."""
        rule = self._own_rule
        if isinstance(rule, AsQuantized | Gptq | Awq):
            sym = not rule.zero_point if isinstance(rule, Awq) else rule.sym
            return EngineScheme(INTEGER, rule.bits, rule.group_size, sym)
        return None

    @cached_property
    def _exact_names(self) -> frozenset[str]:
        """The names in the config that stand for one module each; patterns, which are no names, are among them."""
        groups = (self.quantization.child("config_groups") or JsonObject()).values()
        listed = (group.get("targets") for group in groups if isinstance(group, dict))
        names = [name for names in listed if isinstance(names, list) for name in names]
        extra = self.quantization.child("extra_config") or JsonObject()
        return frozenset(name for name in (*extra, *names) if isinstance(name, str))

    def _fitting(self, module: Module) -> EngineScheme | None:
        """Return the first reading that the shapes of a module's tensors fit, or None."""
        for found in self._readings(module):
            if isinstance(found, EngineScheme) and found.storage == module.storage and self._fits(found, module):
                return found
        return None

    def _is_general(self, module: Module) -> bool:
        """Check whether the shapes fit what the config says in general, which takes no search in patterns."""
        general = self._general
        return general is not None and module.storage == INTEGER and self._fits(general, module)

    def _fits(self, stated: EngineScheme, module: Module) -> bool:
        if module.storage == COMPRESSED:
            return _compressed_fits(stated, module)
        if module.storage != INTEGER or not {"qweight", "scales"} <= module.parts.keys():
            return True
        try:
            scheme = _packing_scheme(stated, self._packing, module.name)
        except CheckpointError:
            return False
        parts = module.packed_parts
        return check_parts(module.name, parts, scheme, scheme.weight_shape(parts)) is None

    def _by_shapes(self, module: Module) -> PackingScheme | None:
        """Return how a module is packed by the shapes of its parts, whatever the config says."""
        like = PackingScheme(4, self.quantization.integer("group_size") or 0, self._packing)
        return PackingScheme.of_parts(module.packed_parts, like)


def _packing_scheme(stated: EngineScheme, packing: Packing, module: str) -> PackingScheme:
    """Check what the config says of a packed module. Raises CheckpointError for what Requant cannot unpack."""
    bits, size = stated.bits, stated.group_size
    known = type(bits) is int and bits in ((4,) if packing == "awq" else BITS)
    if not stated.quantized or not known or type(size) is not int or not (size == -1 or size > 0):
        raise CheckpointError(f"quantization_config gives {module} bits={shorten(bits)}, group_size={shorten(size)}")
    return PackingScheme(bits, size, packing)


def _compressed_fits(stated: EngineScheme, module: Module) -> bool:
    """Check whether bits and group size fit the packed words and scales of a module; true if shapes cannot tell."""
    packed, scale, size = module.parts["weight_packed"], module.parts.get("weight_scale"), stated.group_size
    if scale is None or len(scale.shape) != 2 or len(packed.shape) != 2 or type(size) is not int or size <= 0:
        return True
    inputs = packed.shape[1] * (32 if packed.dtype == "I32" else 8) // max(stated.bits, 1)
    return bool(scale.shape[1] == -(-inputs // size))


def _told(stated: EngineScheme) -> str:
    because = f" ({stated.because})" if stated.because not in ("", BY_TENSORS) else ""
    if not stated.quantized:
        return f"that the module is not quantized{because}"
    if stated.storage not in (INTEGER, COMPRESSED):
        return f"that it is {stated.storage}{because}"
    return f"{stated.bits} bits in {_groups(stated.group_size)}{because}"


def _only(values: set[Scalar]) -> Scalar:
    return values.pop() if len(values) == 1 else None


def _groups(group_size: Any) -> str:
    return "one group for each row" if group_size in (-1, None) else f"groups of {group_size}"


def _method(quantization: QuantizationConfig) -> str:
    return shown(repr(quantization.get("quant_method")))
