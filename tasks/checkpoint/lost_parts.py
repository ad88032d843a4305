"""Finds quantized modules that lack a scale or zero point which the modules like them in other layers have.

Which second scales a method needs is not written in its config: NVFP4 has one for the whole matrix, asymmetric packing
has zero points. So modules of one name, storage and dtype are compared with each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from requant.tasks.checkpoint.inventory import NUMBER
from requant.tasks.checkpoint.modules import Module

# Parts that all modules alike have, or none. Scales of activations are not among them: experts that saw no token in
# calibration have none. `problems.py` tells of the first scale, which every module has.
COMPARED = ("weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_shape")
MIN_OTHERS = 3
MAX_LACKING = 0.25  # of the modules alike; with more, the layers may have schemes of their own


def lost_parts(modules: Iterable[Module]) -> Iterator[str]:
    """Yield a sentence for each part that a few of the modules alike lack."""
    alike: dict[tuple[str, str, str], list[Module]] = {}
    for module in modules:
        if module.quantized:
            key = NUMBER.sub("*", module.name), module.storage, module.tensor.dtype
            alike.setdefault(key, []).append(module)
    for group in alike.values():
        counts = Counter(part for module in group for part in COMPARED if part in module.parts)
        for part, count in counts.items():
            lacking = [module for module in group if part not in module.parts]
            if count >= MIN_OTHERS and 0 < len(lacking) <= MAX_LACKING * len(group):
                more = f" (and {len(lacking) - 1} more like it)" if len(lacking) > 1 else ""
                yield f"{lacking[0].name}.{part} is missing{more}, and the same module of {count} other layers has one"
