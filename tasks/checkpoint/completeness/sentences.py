"""Says in sentences what a checkpoint lacks."""

from __future__ import annotations

from collections.abc import Iterator

from requant.tasks.checkpoint.checkpoint import MAX_PROBLEMS_OF_KIND, Checkpoint
from requant.tasks.checkpoint.completeness import Completeness
from requant.tasks.checkpoint.completeness.needed import Lack
from requant.tasks.checkpoint.mtp import LAYER_NAME
from requant.tasks.checkpoint.untrusted import shown

# vLLM 0.32.0, model_loader/default_loader.py: load_weights looks for parameters without a tensor only in models that
# are not quantized, and there not at the parts of a fused parameter.
QUANTIZED = "vLLM starts with uninitialized memory there"
PLAIN = "vLLM refuses to start, or starts with uninitialized memory there"


def lack_problems(checkpoint: Checkpoint, completeness: Completeness) -> Iterator[str]:
    """Yield a sentence for each tensor that is missing or has another shape than the architecture needs.

    Layers without any tensor are left out, and packed modules without their words: other sentences name them.
    """
    layers = {match[0] for name in checkpoint.tensors if (match := LAYER_NAME.match(name))}
    packed = {f"{module.name}.weight" for module in checkpoint.modules.values() if module.storage == "integer"}
    lacks = [
        lack
        for lack in completeness.lacks
        if (not (match := LAYER_NAME.match(lack.name)) or match[0] in layers)
        and not (lack.there is None and lack.name in packed)
    ]
    other = _other_prefix(checkpoint, lacks)
    if other is not None:
        there, needed = other
        yield f"tensors are named as {shown(there)}, and engines look for {shown(needed)}: rename them as in the base"
        return
    known = completeness.architecture
    consequence = QUANTIZED if checkpoint.quantization else PLAIN
    for lack in lacks[:MAX_PROBLEMS_OF_KIND]:
        layered = LAYER_NAME.match(lack.name) is not None
        needs = f"{known} needs it" if known else "other layers have it" if layered else "a language model needs it"
        yield _sentence(lack, f"{needs}: {consequence}")
    if len(lacks) > MAX_PROBLEMS_OF_KIND:
        yield f"{len(lacks) - MAX_PROBLEMS_OF_KIND:,} more tensors are missing, such as {shown(lacks[-1].name)}"


def _sentence(lack: Lack, why: str) -> str:
    if lack.there is not None and lack.needed is not None:
        wanted = " x ".join("any" if side is None else str(side) for side in lack.needed)
        has = " x ".join(map(str, lack.there)) or "no sides"
        return f"{shown(lack.name.removesuffix('.weight'))} has shape {has}, and the sizes of config.json need {wanted}"
    return f"{shown(lack.name)} is missing, and {why}"


def _other_prefix(checkpoint: Checkpoint, lacks: list[Lack]) -> tuple[str, str] | None:
    """Return a name of a tensor and that which it should have, if most of what is missing is there behind a prefix."""
    missing = [lack.name for lack in lacks if lack.there is None]
    if not missing:
        return None
    ends = {name.partition(".")[2]: name for name in checkpoint.tensors}
    moved = [name for name in missing if name in ends]
    return (ends[moved[0]], moved[0]) if 2 * len(moved) > len(missing) else None
