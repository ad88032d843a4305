"""Lists the modules of a checkpoint in groups, says how their weights are stored, and describes the MTP head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import QuantizationConfig
from requant.tasks.checkpoint.document import HeadDocument, ModuleGroup
from requant.tasks.checkpoint.heads.missing import EXPERT_MATRIX, depths_of, missing_modules
from requant.tasks.checkpoint.modules import Module, modules_of
from requant.tasks.checkpoint.mtp import Head
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.errors import CheckpointError

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
MAX_LISTED_MODULES = 200


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
    modules = modules_of(checkpoint.tensors[name] for name in head.names)
    stored = {name: storage_of(module, checkpoint.quantization) for name, module in modules.items()}
    missing = missing_parts(checkpoint, head)
    return HeadDocument(
        present=True,
        layout=head.layout,
        layers=checkpoint.config.mtp_layers or depths_of(head, checkpoint.config),
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
    """Return the names of modules that the MTP head must have and lacks."""
    own = modules_of(checkpoint.tensors[name] for name in head.names)
    return missing_modules(head, checkpoint.config, own, checkpoint.modules)


def _experts(modules: Iterable[str]) -> Literal["fused", "split"] | None:
    """Return whether the experts of a head are fused in 3-D tensors or split; None if it has no experts."""
    found = [match for name in modules if (match := EXPERT_MATRIX.search(name))]
    return ("split" if found[0][1] else "fused") if found else None
