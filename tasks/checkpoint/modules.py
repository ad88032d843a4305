"""Tensor names grouped into modules, and which of them hold packed or scaled weights.

What tells is the name of a part and its dtype, never a config: a config may lie about the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from requant.tasks.checkpoint.header import Tensor

# Parts of GPTQ and AWQ packings (auto-round's among them), then of compressed-tensors, then of scaled FP8 and INT8.
INTEGER_PARTS = ("qweight", "qzeros", "scales", "g_idx")
COMPRESSED_PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
SCALED_PARTS = ("weight_scale_inv", "weight_scale_2", "activation_scale")
PLAIN_PARTS = ("weight", "bias")
PARTS = (*INTEGER_PARTS, *COMPRESSED_PARTS, *SCALED_PARTS, *PLAIN_PARTS)
NARROW = {"I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4"}  # dtypes that need a scale beside them


@dataclass(frozen=True)
class Module:
    """A module and its tensors by part. A parameter that is no module's `weight` (fused 3-D experts, `A_log`) stands
    alone, under the part `""`."""

    name: str
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def storage(self) -> str:
        """How the weight lies there: `integer` (GPTQ, AWQ), `compressed` (compressed-tensors), `scaled` or `plain`."""
        if any(part in self.parts for part in INTEGER_PARTS):
            return "integer"
        if "weight_packed" in self.parts:
            return "compressed"
        weight = self.parts.get("weight")
        if weight is not None and weight.dtype in NARROW:
            return "scaled"
        return "plain"

    @property
    def quantized(self) -> bool:
        return self.storage != "plain"

    @property
    def packed_parts(self) -> dict[str, Tensor]:
        """The parts of a GPTQ or AWQ packing."""
        return {part: self.parts[part] for part in INTEGER_PARTS if part in self.parts}

    @property
    def tensor(self) -> Tensor:
        """The tensor that holds most of it."""
        return max(self.parts.values(), key=lambda t: t.nbytes)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts.values())


def split_name(name: str) -> tuple[str, str]:
    """`(module, part)` of a tensor's name; the part is empty where the name ends in no part's name."""
    module, _, part = name.rpartition(".")
    return (module, part) if module and part in PARTS else (name, "")


def modules_of(tensors: Iterable[Tensor]) -> dict[str, Module]:
    """All modules, in the order in which their first tensor comes."""
    modules: dict[str, Module] = {}
    for tensor in tensors:
        name, part = split_name(tensor.name)
        modules.setdefault(name, Module(name)).parts[part] = tensor
    return modules
