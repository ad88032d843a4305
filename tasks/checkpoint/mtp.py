"""Finds the tensors of an MTP head, and says in which layout they are.

The layouts are in `heads/layouts.py`. A head in none of them is `unknown`: it is kept as it is, and not judged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.heads.layout import LAYER_NAME, HeadLayout, HeadName
from requant.tasks.checkpoint.heads.layouts import BY_NAME, LAYOUTS, UNKNOWN

__all__ = ["LAYER_NAME", "Head", "find_head"]
_NUMBERS = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class Head:
    """The MTP head: the name of its layout (`heads/layouts.py`), and the sorted names of its tensors."""

    layout: str
    names: tuple[str, ...]

    @property
    def modules(self) -> list[str]:
        """Names of the linear modules, as far as names say: all modules with a weight, except norms."""
        stems = {n.rpartition(".")[0] for n in self.names if n.rpartition(".")[2] in {"weight", "qweight"}}
        return sorted(s for s in stems if "norm" not in s.rpartition(".")[2])

    @property
    def prefixes(self) -> list[str]:
        """Module prefixes that cover all of the head: `mtp`, or `model.layers.N` for each layer behind the last one."""
        return sorted({name.prefix for name in self.parts.values()})

    @property
    def known(self) -> HeadLayout | None:
        """The layout; None if it is not known."""
        return BY_NAME.get(self.layout)

    @cached_property
    def parts(self) -> dict[str, HeadName]:
        """The names of the tensors, each taken apart."""
        return {name: part for name in self.names if (part := HeadName.of(name, layers=0))}

    @property
    def layers(self) -> list[int]:
        """Numbers of the decoder layers in the names of the tensors, in order."""
        if self.known and not self.known.layers:
            return []
        stem = f"{self.known.layers}." if self.known else ""
        return sorted({p.layer for p in self.parts.values() if p.layer is not None and p.key.startswith(stem)})

    @property
    def copies(self) -> set[str]:
        """Names of the tensors that are copies of the main model's embeddings and output layer."""
        shared = tuple(f"{key}." for key in self.known.shared) if self.known else ()
        return {name for name, part in self.parts.items() if part.key.startswith(shared)} if shared else set()


def find_head(names: Iterable[str], config: ModelConfig) -> Head | None:
    """Return the MTP head among the names of a checkpoint's tensors, or None.

    All tensors below a component that begins with `mtp` or `nextn` belong to it. Without such tensors, or if engines
    read the model's head there, all layers behind the last one that the config counts do.
    """
    stated = config.text.integer("num_hidden_layers")
    layers = stated if stated is not None and stated > 0 else None
    parts = {name: part for name in names if (part := HeadName.of(name, layers))}
    named = {name: part for name, part in parts.items() if not part.is_layer}
    if named and not any(layout.layers == "layers.*" and layout.belongs_to(config) for layout in LAYOUTS):
        parts = named  # layers behind the last one are something else then
    if not parts:
        return None
    layout = _layout({_NUMBERS.sub(".*", part.key) for part in parts.values()}, config)
    return Head(layout.name if layout else UNKNOWN, tuple(sorted(parts)))


def _layout(keys: Collection[str], config: ModelConfig) -> HeadLayout | None:
    """Return the layout that engines read for this model, if there are tensors of it; else the one that fits all.

    `keys`: those of the head's tensors, with `*` for every number. Engines may read two layouts for a model, as for
    DeepSeek V4: then it is the one of whose modules most are there.
    """
    own = [layout for layout in LAYOUTS if layout.belongs_to(config) and any(map(layout.is_place_of, keys))]
    if own:
        return max(own, key=lambda layout: Fraction(layout.present(keys), len(layout.modules)))
    others = (layout for layout in LAYOUTS if all(map(layout.fits, keys)) and layout.present(keys))
    return max(others, key=lambda layout: layout.present(keys), default=None)
