"""Names the tensors of a group in one layer, in the form in which a checkpoint has its experts.

Experts are fused in two 3-D tensors or split into two or three matrices each. transformers 5.23.0 keeps them fused in
memory and writes some architectures in one form and some in the other; engines read both.
"""

from __future__ import annotations

from collections.abc import Iterator

from requant.tasks.checkpoint.completeness.conditions import Values
from requant.tasks.checkpoint.completeness.names import Stored, without_leading
from requant.tasks.checkpoint.completeness.needs import COUNT, Group, split_layers

MAX_EXPERTS = 4096
FUSED = ("gate_up_proj", "down_proj")
# The matrices of an expert that are in each fused tensor, in the usual names and in Mixtral's.
MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FUSED_OF = {"gate_proj": "gate_up_proj", "w1": "gate_up_proj", "down_proj": "down_proj", "w2": "down_proj"}
SECOND = ("up_proj", "w3")  # They lie in gate_up_proj too.
Sides = tuple[int | None, ...]
Expected = tuple[str, str, Sides]  # a name without leading prefixes, as transformers writes it, and its shape


def expanded(group: Group, layer: int, values: Values, stored: Stored) -> Iterator[Expected]:
    """Yield the tensors of a group in a layer. A side is None where no formula is known, and a shape is then empty."""
    prefix = split_layers(group.layers)[0]
    lead = f"{prefix}{layer}." if prefix else ""
    for name, formulas in group.tensors.items():
        shape = tuple(values.size(formula) if formula else None for formula in formulas or ())
        counted = COUNT.search(name)
        if counted is None:
            yield from _one(lead + name, shape, stored)
        else:
            count = min(values.size(counted[1]) or 0, MAX_EXPERTS)
            yield from _many(lead + name[: counted.start()], name[counted.end() :], count, shape, stored)


def _many(before: str, after: str, count: int, shape: Sides, stored: Stored) -> Iterator[Expected]:
    """Yield a tensor for each item, or the tensor that holds all of them."""
    short, matrix = without_leading(before), after.removeprefix(".").removesuffix(".weight")
    experts = short.endswith("experts.") and (matrix in FUSED_OF or matrix in SECOND)
    if experts and f"{short}0{after}" not in stored.shapes and any(short + fused in stored.shapes for fused in FUSED):
        if matrix in FUSED_OF:
            yield short + FUSED_OF[matrix], before + FUSED_OF[matrix], (count, None, None)
        return
    for item in range(count):
        yield f"{short}{item}{after}", f"{before}{item}{after}", shape


def _one(full: str, shape: Sides, stored: Stored) -> Iterator[Expected]:
    """Yield a tensor or, if it is one of fused experts and these are split here, their matrices."""
    short = without_leading(full)
    stem, _, fused = short.rpartition(".")
    if fused not in FUSED or not stem.endswith("experts") or any(f"{stem}.{name}" in stored.shapes for name in FUSED):
        yield short, full, shape
        return
    split = stored.experts.get(stem, 0)
    if not split:
        yield short, full, shape
        return
    count = min(max(split, (shape[0] if shape else 0) or 0), MAX_EXPERTS)
    usual = full.removesuffix(fused)
    for expert in range(count):
        for matrix in MATRICES[fused]:
            yield f"{stem}.{expert}.{matrix}.weight", f"{usual}{expert}.{matrix}.weight", ()
