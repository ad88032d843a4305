"""Which layers auto-round packs, and the quantization config that it writes: its rule, from names and shapes.

Source: auto_round 0.16.1, compressors/layer_config_resolver.py, export/export_to_autoround/export.py, export/utils.py
and special_model_handler.py. Compared with what it really does by tests/integration/test_plan_auto_round.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from requant.tasks.checkpoint.blocks import block_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.recipe.quantize import SCHEME, Quantize, packing_format
from requant.tasks.versions import locked_version

FULL = {"bits": 16, "data_type": "fp"}
KEPT = "quantize.layers keeps it"
KEYS = ("bits", "group_size", "sym", "data_type")
# Matrices in decoder blocks that are no Linear: routers, and what is looked up.
NO_LINEAR = re.compile(r"(^|\.)(gate|router|[a-z_]*embed[a-z_]*|[a-z_]*norm|wte|wpe)$")
ROUTER_SUFFIX = re.compile(r"\.gate$")  # in a model with experts: kept by a pattern of its own
# What auto-round writes of a layer outside the blocks, beside KEYS.
OUTSIDE = {
    "act_bits": 16, "act_data_type": "float", "act_dynamic": True, "act_sym": True, "rotation_config": None,
    "super_bits": None, "super_group_size": None,
}  # fmt: skip


@dataclass(frozen=True)
class LayerSelection:
    """What becomes of the linear layers: the packed ones, the quantization config, and what to say about them.

    `why` holds the reason for each matrix of a block that is kept as it is. `problems` are sentences.
    """

    packed: tuple[str, ...]
    quantization: dict[str, Any]
    why: dict[str, str]
    notes: list[str]
    problems: list[str]
    own_group: frozenset[str] = frozenset()  # packed ones that the recipe's `layers` gives a group size


def choose_layers(base: Checkpoint, asked: Quantize) -> LayerSelection:
    """Apply auto-round's rule and the recipe's `layers` to a base (BF16, experts one by one: as it is quantized)."""
    bits, group_size, sym = asked.resolved
    default = {"bits": bits, "group_size": group_size, "sym": sym, "data_type": "int"}
    head = set(base.head.names if base.head else ())
    linear = {name: tensor for name, tensor in linear_layers(base.tensors.values()) if tensor.name not in head}
    odd = {name for name, tensor in linear.items() if any(side % 32 for side in tensor.shape)}
    notes: list[str] = []
    layers = {key: _setting(value, sym) for key, value in asked.layers.items() if is_pattern(key)}
    if base.config.get("tie_word_embeddings") or base.text_config.get("tie_word_embeddings"):
        layers.pop("lm_head", None)
    own, patterns = _overrides(layers, linear, odd, notes)
    settings = {name: {**default, **own.get(name, {}), **(FULL if name in odd else {})} for name in linear}
    asked_for = {n for n, s in settings.items() if s["bits"] < 16 and (block_of(n) or n in own)}
    outside = sorted(n for n in asked_for if not block_of(n))
    widths = {settings[name]["bits"] for name in asked_for} | {s.get("bits", bits) for s in patterns.values()}
    packing = packing_format(asked.format, bits, sym, widths)
    problems = _impossible(asked, packing, widths)
    problems += _outside(outside, vision=isinstance(base.config.get("vision_config"), dict))
    why = {n: "its sides are no multiples of 32" for n in odd if block_of(n)}
    why |= {n: KEPT for n, s in settings.items() if s["bits"] >= 16 and n not in odd}

    extra = {n: _differences(settings[n], default) for n in linear if block_of(n)}
    extra |= {n: {**OUTSIDE, "act_group_size": group_size, **settings[n]} for n in outside}
    extra |= {key: _differences({**default, **value}, default) for key, value in patterns.items()}
    if any("expert" in name for name in linear):
        gates = (
            n for n in linear_names(base.tensors.values()) if ROUTER_SUFFIX.search(n) and f"{n}.weight" not in head
        )
        extra |= {standard_regex(n): {"bits": 16, "data_type": "float"} for n in gates}
    packs_head = packing == "auto_round:auto_gptq" and _packs_head(base, patterns)
    document = {
        "autoround_version": locked_version("auto-round"),
        "bits": bits,
        "block_name_to_quantize": _containers(linear, packs_head),
        "data_type": "int",
        **({"enable_quanted_input": False} if not asked.iters else {}),
        "extra_config": {key: dict(sorted(value.items())) for key, value in sorted(extra.items()) if value},
        "group_size": group_size,
        **({"iters": asked.iters} if asked.iters not in {0, 200} else {}),
        **({"lr": asked.lr, "minmax_lr": asked.lr} if _lr_is_told(asked) else {}),
        "packing_format": packing,
        "quant_method": "auto-round",
        "sym": sym,
    }
    if not document["extra_config"]:
        del document["extra_config"]
    packed = tuple(name for name in linear if name in asked_for)
    own_group = frozenset(name for name in packed if "group_size" in own.get(name, {}))
    return LayerSelection(packed, document, why, notes, problems, own_group)


def keeps(value: Mapping[str, Any]) -> bool:
    return bool(_setting(value, True).get("bits", 4) >= 16)


def linear_layers(tensors: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Modules that are a Linear as far as name and shape tell, with their weight."""
    for tensor in tensors:
        module, _, last = tensor.name.rpartition(".")
        if last == "weight" and len(tensor.shape) == 2 and not NO_LINEAR.search(module):
            yield module, tensor


def linear_names(tensors: Iterable[Tensor]) -> list[str]:
    """Names of all modules with a matrix for a weight."""
    return [t.name.removesuffix(".weight") for t in tensors if t.name.endswith(".weight") and len(t.shape) == 2]


def standard_regex(key: str) -> str:
    """auto-round's reading of a name in `layers`: to_standard_regex in auto_round/utils/common.py."""
    if not any(mark in key for mark in (".*", "^", "$", "|", "(", ")", "[", "]", "?", "+")):
        return f".*{re.escape(key)}.*"
    pattern = re.sub(r"\.(?!\*)", r"\\.", key)
    if not pattern.startswith(("^", ".*")):
        pattern = f".*{pattern}"
    return pattern if pattern.endswith(("$", ".*")) else f"{pattern}.*"


def is_pattern(key: str) -> bool:
    try:
        re.compile(standard_regex(key))
    except re.error:
        return False
    return True


def _overrides(
    layers: Mapping[str, dict[str, Any]], linear: Mapping[str, Tensor], odd: set[str], notes: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """`layers` by layer, and its patterns by auto-round's regex. A pattern wins over a name, a later one over it.

    All layers that one pattern names share one setting in auto-round: where one of them cannot be packed, all are kept.
    """
    own = {name: setting for name, setting in layers.items() if name in linear}
    patterns: dict[str, dict[str, Any]] = {}
    for key, setting in layers.items():
        if key in linear:
            continue
        regex = standard_regex(key)
        patterns[regex] = setting
        found = [name for name in linear if re.search(regex, name)]
        stuck = [name for name in found if name in odd]
        if stuck and setting.get("bits", 0) < 16 and len(stuck) < len(found):
            notes.append(
                f"quantize.layers {key!r}: auto-round keeps all {len(found)} layers that it names in 16 bits, because "
                f"{stuck[0]} is one of them, whose sides are no multiples of 32: name the others alone"
            )
        own |= dict.fromkeys(found, {**setting, **FULL} if stuck else setting)
    return own, patterns


def _setting(value: Mapping[str, Any], sym: bool) -> dict[str, Any]:
    """One entry of `layers`, its scheme spelled out. 8 bits are symmetric, whatever the recipe says of the others."""
    setting = {key: value[key] for key in KEYS if value.get(key) is not None}
    match = SCHEME.fullmatch(str(value.get("scheme", "")).upper())
    if match:
        named = {"bits": int(match["bits"]), "group_size": int(match["group_size"] or 128), "sym": True}
        setting = {**named, **setting}
    if setting.get("bits") == 8 and not sym:
        setting.setdefault("sym", True)
    return setting


def _differences(setting: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    return {key: setting[key] for key in KEYS if setting[key] != default[key]}


def _containers(linear: Iterable[str], packs_head: bool) -> str | list[str]:
    """The lists of blocks, as `model.layers`."""
    blocks = (block_of(name) for name in linear)
    names = list(dict.fromkeys(block.rpartition(".")[0] for block in blocks if block))
    names += ["mtp.layers"] if packs_head else []
    return names[0] if len(names) == 1 else names


def _packs_head(base: Checkpoint, patterns: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a pattern makes auto-round pack a part of an `mtp` head, which Requant then leaves away."""
    head = split_fused_experts(base, head_too=True).head
    inside = [module for module in (head.modules if head else ()) if module.startswith("mtp.layers.")]
    return any(p.get("bits", 4) < 16 and re.search(regex, m) for regex, p in patterns.items() for m in inside)


def _lr_is_told(asked: Quantize) -> bool:
    return asked.lr is not None and asked.lr != (1.0 / asked.iters if asked.iters else 5e-3)


def _impossible(asked: Quantize, packing: str, widths: set[int]) -> list[str]:
    """Settings of single layers that auto-round refuses, hours later or at once."""
    problems = []
    for key, value in asked.layers.items():
        if not is_pattern(key):
            problems.append(f"quantize.layers {key!r} is no regular expression: write a layer's name, or a part of it")
        if value.get("bits") == 8 and value.get("sym") is False:
            problems.append(f"quantize.layers {key!r}: 8 bits with sym false cannot be served: leave sym out")
        if str(value.get("data_type", "int")) != "int" and value.get("bits", 4) < 16:
            problems.append(f"quantize.layers {key!r}: data_type {value['data_type']!r} needs bits: 16 beside it")
    if packing == "auto_round:auto_awq" and not widths <= {4, 16}:
        others = ", ".join(map(str, sorted(widths - {4, 16})))
        problems.append(f"quantize.layers: format {packing} holds 4 bits only, not {others}: use format auto_round")
    return problems


def _outside(names: list[str], *, vision: bool) -> list[str]:
    foreign = [name for name in names if vision or name != "lm_head"]
    if not foreign:
        return []
    return [
        f"quantize.layers asks to quantize {foreign[0]}, which lies in no decoder block: auto-round "
        f"{locked_version('auto-round')} cannot{' of a base with vision' if vision else ''}: name layers of blocks, "
        "for instance layers.*mlp"
    ]
