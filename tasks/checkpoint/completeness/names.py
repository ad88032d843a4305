"""Names and shapes of the parameters that a checkpoint has, whatever its prefixes and however they are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.packing import REQUIRED
from requant.tasks.errors import CheckpointError

# Prefixes that loaders add and remove. Sources: transformers 5.23.0, conversion_mapping.py and PrefixChange in
# core_model_loading.py; vLLM 0.32.0, the hf_to_vllm_mapper of models/qwen3_5.py, qwen2_vl.py and mistral3.py.
LEADING = ("model.", "language_model.", "transformer.", "backbone.", "thinker.")
NUMBER = re.compile(r"\.\d+(?=\.|$)")
# The parts of a module that hold its weight, in the methods that Requant can read.
WEIGHT_PARTS = frozenset({"weight", "qweight", "weight_packed"})
UNPACKED = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8"})
# The parts that scale or describe a weight and never hold it, in the methods that Requant cannot read (methods.py).
BESIDE_WEIGHT = re.compile(r"bias|SCB|weight_format|weight\..+|scales?|zeros?|biases")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """The parameters of a checkpoint.

    `shapes`: by name without leading prefixes; None where the storage does not say the shape. `leading`: the prefixes
    that were removed, by the first component of what is left. `experts`: how many there are one by one, by the name of
    what contains them, as far as the largest number says.
    """

    shapes: dict[str, Shape | None] = field(default_factory=dict)
    leading: dict[str, str] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Stored:
        """Read the parameters of a checkpoint."""
        stored = cls()
        for module in checkpoint.modules.values():
            for name, shape in _parameters(checkpoint, module):
                stored.add(name, shape)
        return stored

    @classmethod
    def named(cls, shapes: Mapping[str, Shape]) -> Stored:
        """Describe plain parameters."""
        stored = cls()
        for name, shape in shapes.items():
            stored.add(name, shape)
        return stored

    def add(self, name: str, shape: Shape | None) -> None:
        """Add a parameter under its name without prefixes."""
        short = without_leading(name)
        self.shapes[short] = shape
        stem, several, rest = short.partition(".experts.")
        if several:
            number = rest.partition(".")[0]
            if number.isdigit() and len(number) < 7:
                stem += ".experts"
                self.experts[stem] = max(self.experts.get(stem, 0), int(number) + 1)
        self.leading.setdefault(short.partition(".")[0], name[: len(name) - len(short)])

    def full_name(self, short: str, usual: str) -> str:
        """Return the name that a parameter would have here, with the prefix of its neighbours, or else as usual."""
        prefix = self.leading.get(short.partition(".")[0])
        return usual if prefix is None else prefix + short


def without_leading(name: str) -> str:
    """Return a name without the prefixes that loaders add and remove."""
    while name.startswith(LEADING):
        name = name.partition(".")[2]
    return name


def kind_of(name: str) -> str:
    """Return a name with `#` for its numbers."""
    return NUMBER.sub(".#", name)


def is_first_expert(name: str) -> bool:
    """Check whether a tensor is that of no single expert, or of the first: the others have the same names."""
    _, several, rest = name.partition(".experts.")
    return not several or not rest[:1].isdigit() or rest.startswith("0.")


def _parameters(checkpoint: Checkpoint, module: Module) -> Iterator[tuple[str, Shape | None]]:
    """Yield the parameters of a module: its bias, and its weight if any storage of it is there."""
    if not module.readable:
        yield from _of_another_method(module)
        return
    if "bias" in module.parts:
        yield f"{module.name}.bias", module.parts["bias"].shape
    if not WEIGHT_PARTS.isdisjoint(module.parts):
        shape = _weight_shape(checkpoint, module) if is_first_expert(module.name) else None  # enough, and quicker
        yield f"{module.name}.weight", shape
    elif "" in module.parts:
        tensor = module.parts[""]
        yield module.name, tensor.shape if tensor.dtype in UNPACKED else None


def _of_another_method(module: Module) -> Iterator[tuple[str, Shape | None]]:
    """Yield all that a module may stand for whose method Requant cannot read: its tensors, and what they may store.

    Scales alone are no weight, and the blocks of MXFP4 are none without their scales.
    """
    half = "blocks" in module.parts and "scales" not in module.parts
    for part, tensor in module.parts.items():
        yield tensor.name, tensor.shape if tensor.dtype in UNPACKED and not module.quantized else None
        if part != "weight" and not half and not BESIDE_WEIGHT.fullmatch(part):
            yield module.name, None  # fused experts, as in MXFP4
            yield f"{module.name if part else module.name.rpartition('.')[0]}.weight", None


def _weight_shape(checkpoint: Checkpoint, module: Module) -> Shape | None:
    """Return the shape of a weight; None if it is packed in a way that does not say it."""
    weight = module.parts.get("weight")
    if weight is not None:
        return weight.shape if weight.dtype in UNPACKED and module.storage != "integer" else None
    if module.storage == "integer" and all(part in module.parts for part in REQUIRED):
        try:
            return checkpoint.reading.scheme(module).weight_shape(module.parts) or None
        except CheckpointError:
            return None
    return None
