"""Groups tensors into modules, and says how the weights of each module are stored.

This is decided by the names and dtypes of the tensors and not by a config, which may contradict the tensors. Only the
method that a checkpoint declares is asked for: the same names mean other things in other methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.methods import Method

# Parts of weights that GPTQ, AWQ or auto-round packed; of compressed-tensors; of scaled FP8 and INT8 weights.
INTEGER_PARTS = ("qweight", "qzeros", "scales", "g_idx")
COMPRESSED_PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
SCALED_PARTS = ("weight_scale_inv", "weight_scale_2", "activation_scale")
PLAIN_PARTS = ("weight", "bias")
WEIGHTS = ("weight", "qweight", "weight_packed", "")  # parts that hold a weight in one of the forms
PARTS = (*INTEGER_PARTS, *COMPRESSED_PARTS, *SCALED_PARTS, *PLAIN_PARTS)
NARROW_DTYPES = {"I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4"}  # they need a scale
PACKED_DTYPES = {"I32", "U32"}  # of a `weight` that holds several values in a word, as Quark's


Storage = Literal["plain", "integer", "compressed", "scaled", "other"]


@dataclass(frozen=True)
class Module:
    """A module and its tensors by part.

    A parameter whose name does not end in the name of a part (fused 3-D experts, `A_log`) is a module of its own, with
    the part `""`. `readable`: whether the checkpoint's method stores weights in a way that Requant knows.
    """

    name: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    readable: bool = True

    @cached_property
    def storage(self) -> Storage:
        """How the weight is stored: packed integers of GPTQ or AWQ, compressed-tensors, scaled, or plain.

        `other`: quantized, in a way that Requant does not know.
        """
        if not self.readable:
            return "other" if self._quantized_somehow else "plain"
        if any(part in self.parts for part in INTEGER_PARTS):
            return "integer"
        if "weight_packed" in self.parts:
            return "compressed"
        weight = self.parts.get("weight")
        if weight is not None and weight.dtype in NARROW_DTYPES | PACKED_DTYPES:
            return "scaled"
        return "plain"

    @property
    def _quantized_somehow(self) -> bool:
        weight = self.parts.get("weight")
        narrow = weight is not None and weight.dtype in NARROW_DTYPES | PACKED_DTYPES
        return narrow or any(part and part not in PLAIN_PARTS for part in self.parts)

    @property
    def quantized(self) -> bool:
        return self.storage != "plain"

    @property
    def has_weight(self) -> bool:
        """Whether the weight is there, and not only a bias or scales."""
        return any(part in self.parts for part in WEIGHTS)

    @property
    def packed_parts(self) -> dict[str, Tensor]:
        """The packed tensors of GPTQ or AWQ."""
        return {part: self.parts[part] for part in INTEGER_PARTS if part in self.parts}

    @property
    def quantized_parts(self) -> dict[str, Tensor]:
        """The tensors that hold a quantized weight: all parts but the bias; of GPTQ and AWQ, the packed parts."""
        if self.storage == "integer":
            return self.packed_parts
        return {part: tensor for part, tensor in self.parts.items() if part != "bias"}

    @property
    def tensor(self) -> Tensor:
        """The largest tensor of the module."""
        return max(self.parts.values(), key=lambda t: t.nbytes)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts.values())


def split_name(name: str, more_parts: tuple[str, ...] = ()) -> tuple[str, str]:
    """Split a tensor's name into module and part. The part is empty if the name does not end in the name of a part."""
    module, _, part = name.rpartition(".")
    return (module, part) if module and (part in PARTS or part in more_parts) else (name, "")


def modules_of(tensors: Iterable[Tensor], method: Method | None = None) -> dict[str, Module]:
    """Group tensors into modules, in the order of their first tensors. `method`: the one that the config declares."""
    readable = method is None or method.readable
    more_parts = method.more_parts if method else ()
    pattern = re.compile(method.tensors) if method and method.tensors else None
    modules: dict[str, Module] = {}
    for tensor in tensors:
        if pattern is None:
            name, part = split_name(tensor.name, more_parts)
        else:
            match = pattern.fullmatch(tensor.name)
            name, part = (match["module"], match["part"]) if match else (tensor.name, "")
        module = modules.get(name)
        if module is None:
            module = modules[name] = Module(name, readable=readable)
        module.parts[part] = tensor
    return modules
