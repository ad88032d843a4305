"""Lists the modules of a checkpoint in groups, says how their weights are stored, and describes the MTP head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.document import HeadDocument, ModuleGroup
from requant.tasks.checkpoint.heads.missing import EXPERT_MATRIX, depths_of, missing_modules
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.mtp import Head

if TYPE_CHECKING:  # compat imports this module
    from requant.tasks.checkpoint.reading import Reading

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
MAX_LISTED_MODULES = 200
FP4_PARTS = {"weight", "weight_scale", "weight_scale_2"}  # of NVFP4 as ModelOpt stores it


def inventory(checkpoint: Checkpoint) -> list[ModuleGroup]:
    """Group the modules of a checkpoint. The groups are in the order of their first modules."""
    groups: dict[tuple[str, str], list[Module]] = {}
    for module in checkpoint.modules.values():
        key = NUMBER.sub("*", module.name), storage_of(module, checkpoint.reading)
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


def storage_of(module: Module, reading: Reading) -> str:
    """Return how the weights of a module are stored.

    This is a dtype as BF16 or F8_E4M3; INT4 and the like for integers, FP4 for two floats of 4 bits in a byte; or
    `packed` if neither the tensors nor the config tell the bits.
    """
    if module.storage in ("integer", "compressed"):
        bits = reading.bits(module)
        words = module.parts["weight_packed"].dtype if module.storage == "compressed" else "I32"
        return "packed" if bits is None else f"INT{bits}" if words == "I32" else f"FP{bits}"
    dtype = module.parts.get("weight", module.tensor).dtype
    if module.storage == "scaled" and dtype == "I8":
        return "INT8"
    return "FP4" if dtype == "U8" and module.parts.keys() >= FP4_PARTS else dtype


def head_document(checkpoint: Checkpoint) -> HeadDocument:
    """Describe the MTP head of a checkpoint."""
    head = checkpoint.head
    if head is None:
        return HeadDocument(present=False)
    modules = checkpoint.head_modules
    stored = {name: storage_of(module, checkpoint.reading) for name, module in modules.items()}
    missing = missing_parts(checkpoint, head)
    return HeadDocument(
        present=True,
        layout=head.layout,
        layers=depths_of(head, checkpoint.config),
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

    Nothing is said to be missing if the names of the method's tensors are not known.
    """
    if checkpoint.method is not None and not checkpoint.method.named:
        return []
    return missing_modules(head, checkpoint.config, checkpoint.head_modules, checkpoint.modules)


def _experts(modules: Iterable[str]) -> Literal["fused", "split"] | None:
    """Return whether the experts of a head are fused in 3-D tensors or split; None if it has no experts."""
    found = [match for name in modules if (match := EXPERT_MATRIX.search(name))]
    return ("split" if found[0][1] else "fused") if found else None
