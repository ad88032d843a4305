"""Describes the layout of an MTP head, and takes the names of its tensors apart.

Where a family stores its head differs: under a component of the name that begins with `mtp`, or as decoder layers
behind the last one of the model. A name is compared without what comes before that place (`model.`,
`language_model.model.`) and without the layer's number, as `mtp.layers.*.self_attn.q_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from requant.tasks.checkpoint.config import ModelConfig

LAYER_NAME = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")
# The first component that begins with mtp or nextn, before any number: a decoder block has no head of its own.
_COMPONENT = re.compile(r"^(?P<root>(?:[A-Za-z_]\w*\.)*?)(?P<component>(?:mtp|nextn)(?:_\w+)?)\.")
_NUMBER = re.compile(r"\.(\d+)(?=\.)")


@dataclass(frozen=True)
class HeadName:
    """The name of a head's tensor, taken apart.

    `prefix` covers all of its part of the head: `model.mtp`, or `model.layers.61`. `root` is what comes before the
    place of the layout: `model.`. `key` is the rest, with `*` for its first number, which is `layer` (None: no number).
    """

    root: str
    prefix: str
    key: str
    layer: int | None

    @property
    def is_layer(self) -> bool:
        """Whether the tensor lies in a decoder layer behind the last one, and not below `mtp`."""
        return self.key.startswith("layers.*.")

    @classmethod
    def of(cls, name: str, layers: int | None) -> HeadName | None:
        """Take a name apart; None if the tensor is not a head's. `layers`: those of the main model, if known."""
        if ("mtp" in name or "nextn" in name) and (match := _COMPONENT.match(name)):
            return cls._split(name, match["root"], match[0].rstrip("."))
        match = LAYER_NAME.match(name) if layers is not None else None
        if match is None or layers is None or len(match[1]) > 8 or int(match[1]) < layers:
            return None
        return cls._split(name, match[0].removesuffix(f"layers.{match[1]}."), match[0].rstrip("."))

    @classmethod
    def _split(cls, name: str, root: str, prefix: str) -> HeadName:
        below = name[len(root) :]
        number = _NUMBER.search(below)
        if number is None or len(number[1]) > 8:
            return cls(root, prefix, below, None)
        return cls(root, prefix, f"{below[: number.start()]}.*{below[number.end() :]}", int(number[1]))


@dataclass(frozen=True)
class Drafter:
    """An engine's draft model for heads of a layout: the main models for which the engine builds it.

    A main model is named by the first of its config's `architectures`, or by `model_type`: engines look at one or the
    other. `source` is the file of the loader. `most_depths`: with more in the config, the engine refuses to start.
    """

    source: str
    architectures: frozenset[str] = frozenset()
    model_types: frozenset[str] = frozenset()
    most_depths: int | None = None

    def serves(self, config: ModelConfig) -> bool:
        """Check whether the engine builds this draft model for a main model with this config."""
        return architecture_of(config) in self.architectures or bool(model_types_of(config) & self.model_types)


@dataclass(frozen=True)
class HeadLayout:
    """How one family, or several, store an MTP head. Keys are parts of names, as in HeadName.

    name: what `requant inspect` calls it.
    families: the models.
    layers: the key of one decoder layer; empty if there is one layer without a number.
    modules: keys of modules that a complete head has, `|` between spellings of which one is there. With a `*`, each
        depth has it, in its first layer if it has several.
    at_end: those of them that are in the last layer of a depth.
    others: keys below which the other tensors lie.
    shared: keys of copies of the main model's embeddings and output layer, which engines read from the main model.
    counts: keys of the config that count the depths, the first one that is there; with `.` for a key of an object.
    default: the depths if the config does not say; None if engines do not draft then.
    exact: whether there must be as many depths as counted. Otherwise more may be there, which engines skip.
    patterns: keys of the config, of which the first one that is there has one character or entry for each layer of a
        depth.
    one_depth: whether all layers are one depth.
    method: the method of speculative decoding, as vLLM calls it.
    engines: the draft model of each engine that has one.
    layers_differ: the main models whose head's decoder layers have not the modules of the model's own layers.
    """

    name: str
    families: tuple[str, ...]
    layers: str
    modules: tuple[str, ...]
    at_end: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    counts: tuple[str, ...] = ("num_nextn_predict_layers",)
    default: int | None = None
    exact: bool = False
    patterns: tuple[str, ...] = ()
    one_depth: bool = False
    method: str = "mtp"
    engines: Mapping[str, Drafter] = field(default_factory=dict)
    layers_differ: frozenset[str] = frozenset()

    def belongs_to(self, config: ModelConfig) -> bool:
        """Check whether an engine reads heads of this layout for a model with this config."""
        return any(drafter.serves(config) for drafter in self.engines.values())

    def is_place_of(self, key: str) -> bool:
        """Check whether a tensor with this key lies where this layout has the head's layers and modules."""
        return any(f"{key}.".startswith(f"{stem}.") for stem in _spellings((self.layers, *self.modules)))

    def fits(self, key: str) -> bool:
        """Check whether a tensor with this key may be a part of a head of this layout."""
        stems = _spellings((*self.modules, *self.others, *self.shared))
        return any(f"{key}.".startswith(f"{stem}.") for stem in stems)

    def present(self, keys: Iterable[str]) -> int:
        """Count the modules of a complete head of which there are tensors with these keys."""
        dotted = [f"{key}." for key in keys]
        return sum(any(k.startswith(f"{m}.") for m in _spellings((stated,)) for k in dotted) for stated in self.modules)


def _spellings(keys: Iterable[str]) -> list[str]:
    return [spelling for key in keys if key for spelling in key.split("|")]


def architecture_of(config: ModelConfig) -> str:
    """Return the first of the config's `architectures`, by which engines choose a model class; empty if none."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    return first if isinstance(first, str) else ""


def model_types_of(config: ModelConfig) -> set[str]:
    """Return the model types that a config states, of the model and of its language model."""
    return {kind for part in (config, config.text) if (kind := part.string("model_type"))}
