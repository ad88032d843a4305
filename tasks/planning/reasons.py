"""Say why tensors of a result are not quantized, for the plan and the model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from requant.tasks.checkpoint.blocks import block_of
from requant.tasks.checkpoint.heads.layout import HeadName
from requant.tasks.planning.layers import KEPT, LayerSetting, is_pattern, standard_regex

MTP_HEAD = "MTP head: packed, it drafts worse or does not load"
# Reasons by a pattern of the tensor's name. The first match counts.
REASONS = (
    (r"(^|\.)(mtp|nextn)(_\w+)?\.", MTP_HEAD),
    (r"linear_attn\.in_proj_[ab]\b", "as many rows as heads: too few to pack in words"),
    (r"(^|\.)(visual|vision)", "vision tower: text calibration says nothing of it"),
    (r"(norm|layernorm|_norm)\b", "normalization: a vector, and sensitive"),
    (r"conv1d|A_log|dt_bias", "state-space parameters: tiny, and sensitive"),
    (r"embed_tokens|pos_embed", "embeddings: looked up, not multiplied"),
    (r"lm_head", "output layer: one of the most sensitive"),
    (r"(gate|router)\.weight", "router: small, and decides which expert runs"),
    (r"\.bias$", "bias: a vector"),
)


def kept_groups(names: Iterable[str], own: Mapping[str, str] | None = None) -> list[tuple[str, ...]]:
    """Group the tensors that are not quantized. Return rows of name, count and reason.

    Numbers in names become `*`; an MTP head and a vision tower are one group each. `own` has reasons of single layers
    by name, for tensors whose name alone gives none; that of a head's layer behind the last one is MTP_HEAD.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name, own or {}), []).append(name.removesuffix(".weight"))
    escaped = {group: re.sub(r"[^\w.*-]", "?", group) for group in groups}
    return [
        (f"`{escaped[group]}`", str(len(layers)), _reason(group, layers, own or {}))
        for group, layers in sorted(groups.items())
    ]


def _folded(name: str, own: Mapping[str, str]) -> str:
    behind_last = own.get(name.removesuffix(".weight")) == MTP_HEAD
    if head := HeadName.of(name, 0 if behind_last else None):
        return f"{head.prefix}.*"
    tower = re.match(r"((?:model\.)?visual|(?:model\.)?vision_tower)\.", name)
    return f"{tower[1]}.*" if tower else re.sub(r"\.\d+\.", ".*.", name)


def _reason(group: str, layers: Iterable[str], own: Mapping[str, str]) -> str:
    of_group = [why for pattern, why in REASONS if re.search(pattern, group)]
    of_layers = [own[layer] for layer in layers if layer in own]
    if MTP_HEAD in of_layers:
        return MTP_HEAD
    return next(iter([*of_group, *of_layers, "not a matrix of a decoder block"]))


def why_kept(names: Iterable[str], layers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Say why matrices of decoder blocks are not quantized, by layer, without the base.

    `names` are those of a result's tensors that are not quantized, and `layers` is that of the recipe.
    """
    keep = [
        re.compile(standard_regex(key))
        for key, entry in layers.items()
        if is_pattern(key) and LayerSetting.read(entry, sym=True).is_kept
    ]
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and block_of(name)]
    uneven = "its sides, or those of a layer that quantize.layers sets with it, are no multiples of 32"
    return {module: KEPT if any(pattern.search(module) for pattern in keep) else uneven for module in modules}
