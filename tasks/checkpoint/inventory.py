"""Lists the modules of a checkpoint in groups, says how their weights are stored, and describes the MTP head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import QuantizationConfig
from requant.tasks.checkpoint.document import HeadDocument, ModuleGroup
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.mtp import Head
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.errors import CheckpointError

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# The modules of an MTP head besides its decoder layers. Source: vLLM 0.32, qwen3_5_mtp.py for the layout `mtp`;
# deepseek_mtp.py and glm4_moe_mtp.py for the layout `inlined`.
MTP_MODULES = ("mtp.fc", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")
INLINED_MODULES = ("eh_proj", "enorm", "hnorm", "shared_head.norm")
MAX_LISTED_MODULES = 200
EXPERT_MATRIX = re.compile(r"mlp\.experts(\.\d+)?\.(gate_up_proj|gate_proj|up_proj|down_proj)$")


def inventory(checkpoint: Checkpoint) -> list[ModuleGroup]:
    """Group the modules of a checkpoint. The groups are in the order of their first modules."""
    groups: dict[tuple[str, str], list[Module]] = {}
    for module in checkpoint.modules.values():
        key = NUMBER.sub("*", module.name), storage_of(module, checkpoint.quantization)
        groups.setdefault(key, []).append(module)
    return [
        ModuleGroup(
            modules=pattern,
            count=len(modules),
            storage=storage,
            shape=list(modules[0].tensor.shape),
            bytes=sum(module.nbytes for module in modules),
        )
        for (pattern, storage), modules in groups.items()
    ]


def storage_of(module: Module, quantization: QuantizationConfig) -> str:
    """Return how the weights of a module are stored.

    This is a dtype as BF16 or F8_E4M3, INT4 and the like for packed integers with the bits that the config states, or
    `packed` if the config does not state the bits.
    """
    if module.storage == "integer":
        try:
            return f"INT{PackingScheme.of(quantization, module.name).bits}"
        except CheckpointError:
            return "packed"
    if module.storage == "compressed":
        bits = quantization.scheme.bits
        return f"INT{bits}" if bits and module.parts["weight_packed"].dtype == "I32" else "packed"
    return module.parts.get("weight", module.tensor).dtype


def head_document(checkpoint: Checkpoint) -> HeadDocument:
    """Describe the MTP head of a checkpoint."""
    head = checkpoint.head
    if head is None:
        return HeadDocument(present=False)
    modules = checkpoint.head_modules
    stored = {name: storage_of(module, checkpoint.quantization) for name, module in modules.items()}
    missing = missing_parts(checkpoint, head)
    return HeadDocument(
        present=True,
        layout=head.layout,
        layers=checkpoint.config.mtp_layers or len(_layers(modules)),
        precision="+".join(sorted(set(stored.values()))),
        experts=_experts(modules),
        complete=not missing,
        missing=missing,
        tensors=len(head.names),
        bytes=sum(checkpoint.tensors[name].nbytes for name in head.names),
        precisions=dict(Counter(stored.values()).most_common()),
        modules=stored if len(stored) <= MAX_LISTED_MODULES else {},
    )


def missing_parts(checkpoint: Checkpoint, head: Head) -> list[str]:
    """Return the names of modules that the MTP head must have and lacks.

    A decoder layer of a head has the same modules as the main model's last layer with full attention; experts may be
    fused in one of them and split in the other. In addition, a head has the fusion layer and norms of its layout. Of a
    method whose tensors have unknown names, nothing is said to be missing.
    """
    if checkpoint.method is not None and not checkpoint.method.named:
        return []
    own = set(checkpoint.head_modules)
    model = _layer_parts(checkpoint, own)
    missing: list[str] = []
    if head.layout == "mtp":
        prefix = head.prefixes[0].removesuffix("mtp")
        missing += [f"{prefix}{name}" for name in MTP_MODULES if f"{prefix}{name}" not in own]
        promised = max(checkpoint.config.mtp_layers, 1)
        layers = [f"{prefix}mtp.layers.{number}" for number in range(min(promised, 64))]
    else:
        layers = head.prefixes
        missing += [f"{layer}.{name}" for layer in layers for name in INLINED_MODULES if f"{layer}.{name}" not in own]
    for layer in layers:
        there = {_fused(name.removeprefix(f"{layer}.")) for name in own if name.startswith(f"{layer}.")}
        missing += sorted(f"{layer}.{part}" for part in model - there)
    return missing


def _layer_parts(checkpoint: Checkpoint, own: set[str]) -> set[str]:
    """Return the modules of the main model's last decoder layer with full attention, without the layer's prefix."""
    layers: dict[str, set[str]] = {}
    for name in checkpoint.modules:
        match = re.match(r"(.*\.layers\.\d+)\.(.+)$", name)
        if match and name not in own and not re.search(r"visual|vision|audio", name):
            layers.setdefault(match[1], set()).add(_fused(match[2]))
    full = [parts for parts in layers.values() if any(part.startswith("self_attn.") for part in parts)]
    return full[-1] if full else set()


def _fused(part: str) -> str:
    """Return the name that a matrix of experts has if experts are fused; any other name as it is."""
    match = EXPERT_MATRIX.search(part)
    if not match:
        return part
    return "mlp.experts.down_proj" if match[2] == "down_proj" else "mlp.experts.gate_up_proj"


def _experts(modules: Iterable[str]) -> Literal["fused", "split"] | None:
    """Return whether the experts of a head are fused in 3-D tensors or split; None if it has no experts."""
    found = [match for name in modules if (match := EXPERT_MATRIX.search(name))]
    return ("split" if found[0][1] else "fused") if found else None


def _layers(modules: Mapping[str, Module]) -> set[str]:
    return {match[0] for name in modules if (match := re.search(r"layers\.\d+", name))}
