"""Why tensors of a result are not quantized, in words for a plan and for the card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from requant.tasks.checkpoint.blocks import block_of
from requant.tasks.planning.layers import KEPT, is_pattern, keeps, standard_regex

# Why tensors are not quantized: first match wins.
REASONS = (
    (r"(^|\.)mtp\.", "MTP head: packed, it drafts worse or does not load"),
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
    """Tensors that are not packed, each group with its reason. Numbers fold to `*`, head and vision to a row.

    own: reasons of single layers, by name, where a tensor's name does not tell one.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        whole = re.match(r"(mtp|(?:model\.)?visual|(?:model\.)?vision_tower)\.", name)
        folded = f"{whole[1]}.*" if whole else re.sub(r"\.\d+\.", ".*.", name)
        groups.setdefault(folded, []).append(name.removesuffix(".weight"))
    plain = {group: re.sub(r"[^\w.*-]", "?", group) for group in groups}
    return [
        (f"`{plain[group]}`", str(len(layers)), _reason(group, layers, own or {}))
        for group, layers in sorted(groups.items())
    ]


def _reason(group: str, layers: Iterable[str], own: Mapping[str, str]) -> str:
    told = [why for pattern, why in REASONS if re.search(pattern, group)]
    given = [own[layer] for layer in layers if layer in own]
    return next(iter([*told, *given, "not a matrix of a decoder block"]))


def why_kept(names: Iterable[str], layers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Why matrices of decoder blocks are not packed, by layer: of a result, whose base is not at hand any more."""
    keep = [re.compile(standard_regex(key)) for key, value in layers.items() if is_pattern(key) and keeps(value)]
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and block_of(name)]
    uneven = "its sides, or those of a layer that quantize.layers sets with it, are no multiples of 32"
    return {module: KEPT if any(p.search(module) for p in keep) else uneven for module in modules}
