"""Says in sentences what a checkpoint lacks."""

from __future__ import annotations

from collections.abc import Iterator

from requant.tasks.checkpoint.checkpoint import MAX_PROBLEMS_OF_KIND, Checkpoint
from requant.tasks.checkpoint.completeness import Completeness
from requant.tasks.checkpoint.completeness.needed import Lack
from requant.tasks.checkpoint.mtp import LAYER_NAME
from requant.tasks.checkpoint.untrusted import shown

CONSEQUENCE = "vLLM starts with uninitialized memory there"


def lack_problems(checkpoint: Checkpoint, completeness: Completeness) -> Iterator[str]:
    """Yield a sentence for each tensor that is missing or has another shape than the architecture needs.

    Layers without any tensor are left out: other sentences name them.
    """
    layers = {match[0] for name in checkpoint.tensors if (match := LAYER_NAME.match(name))}
    lacks = [lack for lack in completeness.lacks if not (m := LAYER_NAME.match(lack.name)) or m[0] in layers]
    other = _other_prefix(checkpoint, lacks)
    if other is not None:
        there, needed = other
        yield f"tensors are named as {shown(there)}, and engines look for {shown(needed)}: rename them as in the base"
        return
    needs = f"{completeness.architecture} needs it" if completeness.architecture else "its siblings are there"
    for lack in lacks[:MAX_PROBLEMS_OF_KIND]:
        yield _sentence(lack, needs)
    if len(lacks) > MAX_PROBLEMS_OF_KIND:
        yield f"{len(lacks) - MAX_PROBLEMS_OF_KIND:,} more tensors are missing, such as {shown(lacks[-1].name)}"


def _sentence(lack: Lack, needs: str) -> str:
    if lack.there is not None and lack.needed is not None:
        wanted = " x ".join("any" if side is None else str(side) for side in lack.needed)
        has = " x ".join(map(str, lack.there)) or "no sides"
        return f"{shown(lack.name)} has shape {has}, and config.json needs {wanted}"
    return f"{shown(lack.name)} is missing, and {needs}: {CONSEQUENCE}"


def _other_prefix(checkpoint: Checkpoint, lacks: list[Lack]) -> tuple[str, str] | None:
    """Return a name of a tensor and that which it should have, if most of what is missing is there behind a prefix."""
    missing = [lack.name for lack in lacks if lack.there is None]
    if not missing:
        return None
    ends = {name.partition(".")[2]: name for name in checkpoint.tensors}
    moved = [name for name in missing if name in ends]
    return (ends[moved[0]], moved[0]) if 2 * len(moved) > len(missing) else None
