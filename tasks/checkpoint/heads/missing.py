"""Says what an MTP head lacks, and how many layers its config promises. What is not known is not missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.heads.layout import HeadLayout, architecture_of
from requant.tasks.checkpoint.heads.layouts import INLINED, MTP
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.mtp import Head

EXPERT_MATRIX = re.compile(r"mlp\.experts(\.\d+)?\.(gate_up_proj|gate_proj|up_proj|down_proj)$")
MAX_PROMISED = 64  # a config may promise any number of layers


@dataclass(frozen=True)
class StatedCount:
    """What a config says of the number of MTP layers. `key` None: nothing. `count` None: no number, as null."""

    key: str | None
    count: int | None


def stated_count(config: ModelConfig, layout: HeadLayout) -> StatedCount:
    """Return the first of the layout's counts that a config has, of the language model or at the top."""
    for key in layout.counts:
        outer, _, inner = key.rpartition(".")
        for part in (config.text, config):
            place = part.child(outer) if outer else part
            if place is not None and inner in place:
                return StatedCount(key, place.integer(inner))
    return StatedCount(None, layout.default)


def depths_of(head: Head, config: ModelConfig) -> int:
    """Return how many drafts in a row the tensors of a head are for: one for each layer, in most layouts."""
    layout = head.known
    if layout is None:
        return max(len(head.layers), 1)
    return len(_depths(head, layout, config))


def _depths(head: Head, layout: HeadLayout, config: ModelConfig) -> list[Sequence[int]]:
    """Return the numbers of the layers of each depth. A head without numbers in its names has one depth."""
    layers = head.layers
    if not layout.layers:
        return [()]
    if layout.one_depth:
        return [layers] if layers else []
    stated = (config.text.get(key) for key in layout.patterns)
    pattern = next((value for value in stated if isinstance(value, str | list)), None)
    size = 1 if pattern is None and not layout.patterns else max(len(layers if pattern is None else pattern), 1)
    return [layers[start : start + size] for start in range(0, len(layers), size)]


def missing_modules(
    head: Head, config: ModelConfig, own: Mapping[str, Module], model: Mapping[str, Module]
) -> list[str]:
    """Return the names of modules that a head must have and lacks; nothing for a layout that is not known.

    `own` and `model` have the head's and the main model's modules. In the layouts `mtp` and `inlined`, a decoder layer
    of a head has the same modules as the main model's last layer with full attention, unless the table says otherwise;
    experts may be fused in one of them and split in the other. A module without its weight is missing.
    """
    layout = head.known
    if layout is None:
        return []
    root = next(iter(head.parts.values())).root
    depths = _depths(head, layout, config)
    if layout is MTP:  # layers that are promised and not there lack all that they have
        promised = min(max(stated_count(config, layout).count or 0, 1), MAX_PROMISED)
        depths = [[number] for number in range(promised)]
    ends = {False: [depth[0] for depth in depths if depth], True: [depth[-1] for depth in depths if depth]}
    missing = [name for key in layout.modules for name in _lacking(key, root, ends[key in layout.at_end], own)]
    if layout in (MTP, INLINED) and architecture_of(config) not in layout.layers_differ:
        needed = _layer_parts(own, model)
        for number in (number for depth in depths for number in depth):
            layer = f"{root}{layout.layers.replace('*', str(number))}."
            there = {name.removeprefix(layer) for name, one in own.items() if name.startswith(layer) and one.has_weight}
            missing += sorted(f"{layer}{part}" for part in _lost(needed, there))
    return missing


def _lacking(key: str, root: str, numbers: Sequence[int], own: Mapping[str, Module]) -> list[str]:
    """Return the names that a module of a complete head should have and has not, for each layer in `numbers`."""
    found = []
    for number in numbers if "*" in key else [0]:
        names = [f"{root}{spelling.replace('*', str(number))}" for spelling in key.split("|")]
        if not any(name in own or any(other.startswith(f"{name}.") for other in own) for name in names):
            found.append(names[0])
    return found


def _lost(needed: set[str], there: set[str]) -> set[str]:
    """Return the modules of a layer that are not there. Experts are counted one by one if both layers have them so."""
    if _split_matrices(needed) == _split_matrices(there):
        return needed - there
    return {_fused(part) for part in needed} - {_fused(part) for part in there}


def _split_matrices(parts: set[str]) -> set[str]:
    """Return which matrices of experts are stored one by one."""
    return {match[2] for part in parts if (match := EXPERT_MATRIX.search(part)) and match[1]}


def _layer_parts(own: Mapping[str, Module], model: Mapping[str, Module]) -> set[str]:
    """Return the modules of the main model's last decoder layer with full attention, without the layer's prefix."""
    layers: dict[str, set[str]] = {}
    for name in model:
        match = re.match(r"(.*\.layers\.\d+)\.(.+)$", name)
        if match and name not in own and not re.search(r"visual|vision|audio", name):
            layers.setdefault(match[1], set()).add(match[2])
    full = [parts for parts in layers.values() if any(part.startswith("self_attn.") for part in parts)]
    return full[-1] if full else set()


def _fused(part: str) -> str:
    """Return the name that a matrix of experts has if experts are fused; any other name as it is."""
    match = EXPERT_MATRIX.search(part)
    if not match:
        return part
    return "mlp.experts.down_proj" if match[2] == "down_proj" else "mlp.experts.gate_up_proj"
