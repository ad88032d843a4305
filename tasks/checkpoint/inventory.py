"""What a checkpoint is made of: its modules in groups, each with how its weights are stored, and its head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.modules import Module, modules_of
from requant.tasks.checkpoint.mtp import Head, layer_count
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.errors import CheckpointError

INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
# The parts of a head outside its decoder layers. vLLM 0.32: qwen3_5_mtp.py; deepseek_mtp.py and glm4_moe_mtp.py.
APART = ("mtp.fc", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")
INLINED = ("eh_proj", "enorm", "hnorm", "shared_head.norm")
EXPERT_MATRIX = re.compile(r"mlp\.experts(\.\d+)?\.(gate_up_proj|gate_proj|up_proj|down_proj)$")


@dataclass(frozen=True)
class Group:
    """Modules of one name but for their numbers, stored in one way. `storage` as `storage_of` words it."""

    modules: str
    count: int
    storage: str
    shape: tuple[int, ...]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}


def inventory(checkpoint: Checkpoint) -> list[Group]:
    """The groups, in the order in which the first module of each comes. `shape` is the first one's largest tensor's."""
    groups: dict[tuple[str, str], list[Module]] = {}
    for module in checkpoint.modules.values():
        groups.setdefault((INDEX.sub("*", module.name), storage_of(module, checkpoint.quantization)), []).append(module)
    return [
        Group(pattern, len(found), storage, found[0].tensor.shape, sum(m.nbytes for m in found))
        for (pattern, storage), found in groups.items()
    ]


def storage_of(module: Module, quantization: Mapping[str, Any]) -> str:
    """`BF16`; `INT4` and the like for packed weights, as the config has it; a dtype with a scale beside it."""
    if module.storage == "integer":
        try:
            return f"INT{PackingScheme.of(quantization, module.name).bits}"
        except CheckpointError:
            return "packed"
    if module.storage == "compressed":
        bits = scheme_fields(quantization)["bits"]
        return f"INT{bits}" if bits and module.parts["weight_packed"].dtype == "I32" else "packed"
    return module.parts.get("weight", module.tensor).dtype


def scheme_fields(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """`bits`, `group_size` and `sym` as the config's method words them; None where it does not say, or says several."""
    if quantization.get("quant_method") == "compressed-tensors":
        weights = _weights_of_groups(quantization)
        bits, size, sym = (_only(w.get(key) for w in weights) for key in ("num_bits", "group_size", "symmetric"))
        return {"bits": bits, "group_size": size, "sym": sym}
    bits = quantization.get("bits", quantization.get("w_bit"))
    size, sym = quantization.get("group_size", quantization.get("q_group_size")), quantization.get("sym")
    if sym is None and type(quantization.get("zero_point")) is bool:  # AWQ's word
        sym = not quantization["zero_point"]
    return {"bits": bits, "group_size": size, "sym": sym}


def _weights_of_groups(quantization: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = quantization.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    return [w for w in weights if isinstance(w, dict)]


def _only(values: Iterable[Any]) -> Any:
    """The one value of them all, or None."""
    plain = {value for value in values if isinstance(value, int | str)}
    return plain.pop() if len(plain) == 1 else None


def head_document(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `requant inspect --json` says of the head under `mtp`."""
    head = checkpoint.head
    if head is None:
        nothing: dict[str, Any] = {"present": False, "layout": None, "layers": 0, "precision": None}
        nothing |= {"experts": None, "complete": False, "missing": [], "tensors": 0, "bytes": 0}
        return {**nothing, "precisions": {}, "modules": {}}
    modules = modules_of(checkpoint.tensors[name] for name in head.names)
    stored = {name: storage_of(module, checkpoint.quantization) for name, module in modules.items()}
    missing = missing_parts(checkpoint, head)
    return {
        "present": True,
        "layout": head.layout,
        "layers": layer_count(checkpoint.text_config) or len(_layers(modules)),
        "precision": "+".join(sorted(set(stored.values()))),
        "experts": _experts(modules),
        "complete": not missing,
        "missing": missing,
        "tensors": len(head.names),
        "bytes": sum(checkpoint.tensors[name].nbytes for name in head.names),
        "precisions": dict(Counter(stored.values()).most_common()),
        "modules": stored if len(stored) <= 200 else {},
    }


def missing_parts(checkpoint: Checkpoint, head: Head) -> list[str]:
    """Modules that the head must have and has not.

    A decoder layer of a head has the parts of the main model's last full-attention layer, experts fused or split
    alike; around it come the fusion layer and the norms of its layout.
    """
    own = set(modules_of(checkpoint.tensors[name] for name in head.names))
    model = _layer_parts(checkpoint, own)
    missing: list[str] = []
    if head.layout == "mtp":
        prefix = head.prefixes[0].removesuffix("mtp")
        missing += [f"{prefix}{name}" for name in APART if f"{prefix}{name}" not in own]
        promised = max(layer_count(checkpoint.text_config), 1)
        layers = [f"{prefix}mtp.layers.{number}" for number in range(min(promised, 64))]
    else:
        layers = head.prefixes
        missing += [f"{layer}.{name}" for layer in layers for name in INLINED if f"{layer}.{name}" not in own]
    for layer in layers:
        there = {_fused(name.removeprefix(f"{layer}.")) for name in own if name.startswith(f"{layer}.")}
        missing += sorted(f"{layer}.{part}" for part in model - there)
    return missing


def _layer_parts(checkpoint: Checkpoint, own: set[str]) -> set[str]:
    """The parts of the main model's last decoder layer with full attention."""
    layers: dict[str, set[str]] = {}
    for name in checkpoint.modules:
        match = re.match(r"(.*\.layers\.\d+)\.(.+)$", name)
        if match and name not in own and not re.search(r"visual|vision|audio", name):
            layers.setdefault(match[1], set()).add(_fused(match[2]))
    full = [parts for parts in layers.values() if any(part.startswith("self_attn.") for part in parts)]
    return full[-1] if full else set()


def _fused(part: str) -> str:
    """One word for a layer's experts, whether they lie fused or each for itself."""
    match = EXPERT_MATRIX.search(part)
    if not match:
        return part
    return "mlp.experts.down_proj" if match[2] == "down_proj" else "mlp.experts.gate_up_proj"


def _experts(modules: Iterable[str]) -> str | None:
    """Whether the experts of a head lie `fused` in 3-D tensors or `split`, each for itself; None where it has none."""
    found = [match for name in modules if (match := EXPERT_MATRIX.search(name))]
    return ("split" if found[0][1] else "fused") if found else None


def _layers(modules: Mapping[str, Module]) -> set[str]:
    return {match[0] for name in modules if (match := re.search(r"layers\.\d+", name))}
