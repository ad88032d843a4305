"""Lists the layers that an engine builds for a checkpoint's modules, and checks that the tensors fit them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

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
    Renames,
    Rule,
)
from requant.tasks.checkpoint.modules import Module

MAX_NAME_LENGTH = 500  # longer names are no layer of an engine; regular expressions are run on these names
# Names (last component) of layers that engines can quantize. A module that is not quantized is checked only if its name
# is listed; a quantized module is always checked.
LINEARS = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc",
    "qkv", "linear_fc1", "linear_fc2", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz",
    "in_proj_ba", "out_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
})  # fmt: skip
# vLLM's classes, which a config can name as targets. All other layers are ColumnParallelLinear.
LAYER_CLASSES = {
    **dict.fromkeys(("qkv_proj", "qkv"), "QKVParallelLinear"),
    **dict.fromkeys(("gate_up_proj", "in_proj_qkvz", "in_proj_ba", "fused_qkv_a_proj"), "MergedColumnParallelLinear"),
    **dict.fromkeys(("o_proj", "down_proj", "out_proj", "linear_fc2", "proj"), "RowParallelLinear"),
}


@dataclass(frozen=True)
class Tree:
    """How an engine names the layers of a model.

    `plain`: names (last component) of layers that the engine never quantizes. `converted`: those of them whose weight
    may be FP8 with scales too, which the engine converts while it loads.
    """

    renames: Renames = field(default_factory=Renames)
    fused: Fused = field(default_factory=dict)
    plain: frozenset[str] = frozenset()
    converted: frozenset[str] = frozenset()

    def layers(self, modules: Iterable[Module]) -> list[Layer]:
        """Return the layers, in the order of their first modules."""
        fused_names = {part: name for name, parts in self.fused.items() for part in parts if len(parts) > 1}
        layers: dict[str, tuple[str, str, list[str]]] = {}
        experts: dict[str, list[str]] = {}  # kept by layer, since renaming is slow for the 100,000 modules of an MoE
        for module in modules:
            if len(module.name) > MAX_NAME_LENGTH:
                continue
            stem, is_expert, rest = module.name.partition(".experts.")
            if is_expert and (rest[:1].isdigit() or rest in ("gate_up_proj", "down_proj")):
                if stem not in experts:
                    name = self.renames.of_module(f"{stem}.experts")
                    experts[stem] = layers.setdefault(name, (EXPERTS, "RoutedExperts", []))[2]
                experts[stem].append(module.name)
                continue
            stem, _, leaf = self.renames.of_module(module.name).rpartition(".")
            if leaf == "lm_head":
                kind, cls = LM_HEAD, "ParallelLMHead"
            elif leaf in LINEARS or module.quantized or (leaf == "proj" and stem.endswith(".attn")):
                leaf = fused_names.get(leaf, leaf)
                kind, cls = LINEAR, LAYER_CLASSES.get(leaf, "ColumnParallelLinear")
            else:
                continue
            name = f"{stem}.{leaf}".lstrip(".")
            layers.setdefault(name, (kind, cls, []))[2].append(module.name)
        return [Layer(name, kind, cls, tuple(parts)) for name, (kind, cls, parts) in layers.items()]


def first_problem(
    layers: Iterable[Layer],
    rule: Rule,
    modules: Mapping[str, Module],
    tree: Tree,
    kernel_problem: Callable[[Layer, EngineScheme], str | None] = lambda layer, scheme: None,
) -> str | None:
    """Return why the first layer that the engine cannot load cannot be loaded; None if it can load all.

    The sentence names the tensor and the field of the config.
    """
    for layer in layers:
        leaf = layer.name.rpartition(".")[2]
        if leaf in tree.converted and all(_is_scaled_fp8(modules[part]) for part in layer.parts):
            continue
        if leaf in tree.plain:
            scheme = EngineScheme(because="the engine builds this layer without quantization")
        else:
            try:
                scheme = rule.scheme(layer)
            except NotLoadable as refusal:
                return f"quantization_config is refused at {layer.name}: {refusal}"
        problem = _misfit(layer, scheme, modules)
        if problem is None and (kernel := kernel_problem(layer, scheme)):
            problem = f"quantization_config asks for a scheme that no kernel takes: {kernel}"
        if problem:
            return problem
    return None


def _misfit(layer: Layer, scheme: EngineScheme, modules: Mapping[str, Module]) -> str | None:
    shapes_to_check = 3 if layer.kind == EXPERTS else len(layer.parts)  # the shapes of one expert are enough
    for number, part in enumerate(layer.parts):
        module = modules[part]
        if scheme.quantized != module.quantized:
            if not module.quantized:
                stored = "packed" if scheme.storage in (INTEGER, COMPRESSED) else "quantized"
                return (
                    f"{module.tensor.name} is not {stored}, and quantization_config says otherwise ({scheme.because})"
                )
            stored = "packed" if module.storage in (INTEGER, COMPRESSED) else "quantized"
            return f"{_main_tensor(module)} is {stored}, and quantization_config says otherwise ({scheme.because})"
        if scheme.storage != module.storage:
            return (
                f"{_main_tensor(module)} is stored as {module.storage}, and quantization_config says {scheme.storage}"
            )
        if number < shapes_to_check and (problem := shape_problem(module, scheme)):
            return problem
    return None


def _is_scaled_fp8(module: Module) -> bool:
    return module.storage == "scaled" and module.parts["weight"].dtype == "F8_E4M3"


def _main_tensor(module: Module) -> str:
    """Return the name of the tensor that holds the weights."""
    for part in ("qweight", "weight_packed", "weight"):
        if part in module.parts:
            return module.parts[part].name
    return module.tensor.name


def shape_problem(module: Module, scheme: EngineScheme) -> str | None:
    """Return how a quantized module's shapes contradict the scheme, or which part it lacks; None if it fits."""
    if scheme.storage == INTEGER:
        return _integer_problem(module, scheme)
    if scheme.storage != COMPRESSED:
        return None
    scale = module.parts.get("weight_scale")
    packed = module.parts["weight_packed"]
    if scale is None:
        return f"{module.name}.weight_scale is missing beside {packed.name}"
    if type(scheme.group_size) is int and scheme.group_size > 0 and len(scale.shape) == len(packed.shape) == 2:
        inputs = packed.shape[1] * (32 if packed.dtype == "I32" else 8) // scheme.bits
        if scale.shape[1] != -(-inputs // scheme.group_size):
            return _contradiction(scale.name, scale.shape, scheme)
        return _uneven(module, inputs, scheme.group_size)
    return None


def _integer_problem(module: Module, scheme: EngineScheme) -> str | None:
    needed = ("qweight", "scales") if scheme.sym and scheme.layout == "gptq" else ("qweight", "scales", "qzeros")
    for part in needed:
        if part not in module.parts:
            return f"{module.name}.{part} is missing beside {module.tensor.name}"
    qweight, scales, qzeros = (module.parts.get(part) for part in ("qweight", "scales", "qzeros"))
    if qweight is None or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
        return f"{_main_tensor(module)} and {module.name}.scales are no matrices"
    bits, (groups, out) = scheme.bits, scales.shape
    if type(bits) is not int or bits <= 0 or type(scheme.group_size) is not int:
        return _contradiction(qweight.name, qweight.shape, scheme)
    packed_out = out * bits // 32
    if qweight.shape[1] != (packed_out if scheme.layout == "awq" else out):
        return _contradiction(qweight.name, qweight.shape, scheme)
    if qzeros is not None and qzeros.shape != (groups, packed_out):
        return _contradiction(qzeros.name, qzeros.shape, scheme)
    inputs = qweight.shape[0] if scheme.layout == "awq" else qweight.shape[0] * 32 // bits
    if groups != (1 if scheme.group_size == -1 else -(-inputs // scheme.group_size) if scheme.group_size > 0 else 0):
        return _contradiction(scales.name, scales.shape, scheme)
    return _uneven(module, inputs, scheme.group_size)


def _uneven(module: Module, inputs: int, group_size: int) -> str | None:
    """Return why an engine cannot load a module whose last group is smaller than the others; None if groups are equal.

    The engines allocate inputs // group_size rows of scales, or raise. Sources: vLLM 0.32.0, auto_gptq.py, auto_awq.py,
    compressed_tensors_wNa16.py and moe_wna16.py; SGLang 0.5.23, the same names below layers/quantization.
    """
    if group_size <= 0 or not inputs % group_size:
        return None
    return (
        f"{module.name} has {inputs} inputs, no multiple of group_size {group_size}: the engine has room for "
        f"{inputs // group_size} of its {-(-inputs // group_size)} groups"
    )


def _contradiction(name: str, shape: tuple[int, ...], scheme: EngineScheme) -> str:
    return (
        f"{name} has shape {list(shape)}, and quantization_config says {scheme.layout} layout with "
        f"bits={scheme.bits!r}, group_size={scheme.group_size!r}"
    )
