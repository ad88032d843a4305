"""Builds models of one architecture on the meta device, each with another value in its config."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.core_model_loading import revert_weight_conversion

LAYERS = 4
EXPERTS = 8
LAYER_COUNTS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers"}
EXPERT_COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"}
# Keys that shape no tensor, or only by their list of layers.
IGNORED = ("token_id", "token_index", "dtype", "version", "id2label", "label2id", "quantization", "initializer")
OF_ALL_MODELS = PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings"}
# The kinds to try in lists with one for each layer, besides those of ALLOWED_LAYER_TYPES.
BY_LAYER = {"indexer_types": ("full", "shared")}
# Tried where a config has null.
OPTIONAL_VALUES = (True, 1, 2, 48, [1])
MAX_REFUSED = 10  # of the sizes that are tried in pairs
# A description in which one of these is a constant is wrong for models of other sizes.
VARIED = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
Path = tuple[str, ...]
Values = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """One model that was built.

    `changed`: the keys whose values differ from those of the first probe. `minimal`: whether no fewer of them can
    change, so that each may be what makes the difference. `document`: the config as transformers has completed it;
    `values`: what it holds, by path. `shapes`: those of all tensors as `save_pretrained` names them, without those that
    are tied to others.
    """

    changed: frozenset[str]
    values: Mapping[str, Any]
    document: Values
    shapes: Mapping[str, tuple[int, ...]]
    minimal: bool = True


@dataclass(frozen=True)
class Builder:
    """Builds models of one class from changes to a small config."""

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    base: Values

    @classmethod
    def of(cls, config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Builder:
        base = config_class().to_dict()
        for part, part_class in config_class.sub_configs.items():
            if base.get(part, False) is None and part_class is not AutoConfig:
                base[part] = part_class().to_dict()  # a tower that the config leaves out
        base = _small(_without_lists(base))
        whole = config_class(**copy.deepcopy(base)).to_dict()  # with what transformers derives, as head_dim
        whole = _small(_without_lists(whole))
        if "head_dim" in config_class.attribute_map:  # another name of a key that is there
            return cls(config_class, model_class, whole)
        builder = cls(config_class, model_class, _with_head_size(copy.deepcopy(whole)))
        # Some classes compute the width of a head and let nobody set it.
        return builder if builder.probe({}) is not None else cls(config_class, model_class, whole)

    def config(self, changes: Mapping[str, Any], without: str | None = None) -> PreTrainedConfig:
        """Make a config with other values by path, and without a key."""
        document = copy.deepcopy(self.base)
        for path, value in changes.items():
            part, key = _part(document, path)
            part[key] = value
        if without is not None:
            part, key = _part(document, without)
            part.pop(key, None)
        return self.config_class(**document)

    def probe(self, changes: Mapping[str, Any]) -> Probe | None:
        """Build a model; None if transformers refuses the config."""
        try:
            config = self.config(changes)
            document = config.to_dict()
            with torch.device("meta"):
                model = self.model_class._from_config(config)
            tied = set(model.all_tied_weights_keys)
            ignored = model._keys_to_ignore_on_load_missing or ()
            tensors = {name: t for name, t in model.state_dict().items() if name not in tied and name not in ignored}
            saved = revert_weight_conversion(model, tensors)
        except Exception:  # classes raise errors of all kinds for sizes that they do not take
            return None
        values = dict(leaves(document))
        if any(0 in tensor.shape for tensor in saved.values()):
            return None
        return Probe(
            frozenset(changes), values, document, {name: tuple(tensor.shape) for name, tensor in saved.items()}
        )

    def first(self) -> Probe:
        """Build the model that the others are compared with."""
        probe = self.probe({})
        if probe is None:
            raise ValueError(f"{self.model_class.__name__} cannot be built small")
        return probe

    def ties_by_default(self) -> bool:
        """Return whether a config that does not say makes the output layer the embedding."""
        config = self.config({}, without="tie_word_embeddings")
        return bool(getattr(config, "tie_word_embeddings", False))

    def probes(self) -> Iterator[Probe]:
        """Yield the usual model, those that another value of one key makes different, and some with many changes.

        Raises ValueError if an important size or the kinds of the layers cannot be varied.
        """
        first = self.first()
        yield first
        scaled: list[dict[str, int]] = []
        refused: dict[str, int] = {}
        switched: list[Values] = []
        mixed: list[Values] = []
        for path, value in leaves(self.base):
            for other in _others(path, value):
                probe = self.probe({path: other})
                doubled = type(value) is int and other == 2 * value
                if probe is None:
                    refused |= {path: value} if doubled else {}
                elif probe.shapes != first.shapes:
                    yield probe
                    scaled += [{path: value}] if doubled else []
                    switched += [{path: other}] if isinstance(value, bool) else []
                    mixed += [{path: other}] if isinstance(other, list) else []
                elif value is not None:
                    break  # a key without any effect
        yield from self._pairs(first, refused, scaled)
        for kinds, probe in self._kinds_of_layers(first):
            mixed.append(kinds)
            yield probe
        for kinds, switch in product(mixed, switched):  # an optional part may be only in layers of one kind
            probe = self.probe(kinds | switch)
            if probe is not None:
                yield replace(probe, minimal=False)
        generator = random.Random(0)
        for _ in range(8):
            chosen = [sizes for sizes in scaled if generator.random() < 0.5]
            changes: dict[str, int] = {}
            for sizes in chosen:
                factor = generator.choice((2, 4))
                changes |= {path: value * factor for path, value in sizes.items()}
            probe = self.probe(changes)
            if probe is not None:
                yield replace(probe, minimal=False)

    def _pairs(self, first: Probe, refused: Mapping[str, int], scaled: list[dict[str, int]]) -> Iterator[Probe]:
        """Yield the models with two sizes that only change together, as heads * width = hidden size, and note these."""
        varied: set[str] = set()
        important = {path for path in refused if path.rpartition(".")[2] in VARIED}
        tried = sorted(refused, key=lambda path: path not in important)[:MAX_REFUSED]
        for a, b in combinations(tried, 2):
            probe = self.probe({path: 2 * refused[path] for path in (a, b)})
            if probe is not None:
                varied |= {a, b}
                if probe.shapes != first.shapes:
                    scaled.append({path: refused[path] for path in (a, b)})
                    yield probe
        if important - varied:
            raise ValueError(f"no model is made with another {min(important - varied)}")

    def _kinds_of_layers(self, first: Probe) -> Iterator[tuple[Values, Probe]]:
        """Yield changes and models with layers of other kinds, where all that are built here would be of one kind."""
        for path, kinds in first.values.items():
            of_layers = isinstance(kinds, list) and len(kinds) == LAYERS and isinstance(kinds[0], str)
            own = BY_LAYER.get(path.rpartition(".")[2])
            if not of_layers or (own is None and len({*kinds}) > 1):
                continue
            built = 0
            for kind in sorted({*(own or ALLOWED_LAYER_TYPES)} - {kinds[0]}):
                changes = {path: [kinds[0], kind, kinds[2], kind]}
                probe = self.probe(changes)
                built += probe is not None
                if probe is not None and probe.shapes != first.shapes:
                    yield changes, probe
            if not built:
                raise ValueError(f"no model is made with another kind of layers in {path}")


def leaves(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a config by path, as `text_config.hidden_size`."""
    for key, value in document.items():
        if key in OF_ALL_MODELS or key.startswith("rope_") or any(word in key for word in IGNORED):
            continue
        if isinstance(value, Mapping):
            if key.endswith("config"):
                yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _others(path: str, value: object) -> list[Any]:
    """Return the values to try instead of one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        none = [] if path.endswith(("_dim", "_size", "_heads")) else [0]
        return [2 * value, *none, None] if value else [1]
    if isinstance(value, list) and len(value) > 1:
        return [value[:-1]]
    return [*OPTIONAL_VALUES] if value is None else []


def _part(document: Values, path: str) -> tuple[Values, str]:
    *parents, key = path.split(".")
    for parent in parents:
        document = document[parent]
    return document, key


def _small(document: Values) -> Values:
    """Reduce the numbers of layers and experts."""
    for key, value in document.items():
        if isinstance(value, dict) and key.endswith("config"):
            _small(value)
        elif type(value) is int and key in LAYER_COUNTS:
            document[key] = min(value, LAYERS)
        elif type(value) is int and key in EXPERT_COUNTS:
            document[key] = min(value, EXPERTS)
    return document


def _with_head_size(document: Values) -> Values:
    """Put a number where a config has none for the width of a head, which then is that of all heads by their number.

    Models read it from configs whose class does not have the key (transformers 5.23.0, modeling_qwen3_moe.py).
    """
    for value in document.values():
        if isinstance(value, dict):
            _with_head_size(value)
    hidden, heads = document.get("hidden_size"), document.get("num_attention_heads")
    if document.get("head_dim") is None and hidden and heads:
        document["head_dim"] = hidden // heads
    return document


def _without_lists(document: Values) -> Values:
    """Remove lists with a value for each layer, which transformers makes again for another number of layers."""
    for value in document.values():
        if isinstance(value, dict):
            _without_lists(value)
    counts = {document[key] for key in LAYER_COUNTS if key in document}
    for key in [key for key, value in document.items() if isinstance(value, list) and len(value) in counts]:
        del document[key]
    for key in ("transformers_version", "per_layer_config"):
        document.pop(key, None)
    return document
