"""Which layers auto-round quantizes, and the quantization config that it writes, from names and shapes alone.

Source: auto_round 0.16.1, compressors/layer_config_resolver.py, export/export_to_autoround/export.py, export/utils.py
and special_model_handler.py. tests/integration/test_plan_auto_round.py compares this module with auto-round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from requant.tasks.checkpoint.blocks import block_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import QuantizationConfig
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.recipe.quantize_section import SCHEME, Quantize, packing_format
from requant.tasks.versions import locked_version

KEPT = "quantize.layers keeps it"
# Matrices of decoder blocks that are no Linear: routers, and tables that are looked up.
NO_LINEAR = re.compile(r"(^|\.)(gate|router|[a-z_]*embed[a-z_]*|[a-z_]*norm|wte|wpe)$")
ROUTER_SUFFIX = re.compile(r"\.gate$")  # auto-round keeps the routers of a model with experts by a pattern
# What auto-round writes of a layer outside the blocks, in addition to its setting.
OUTSIDE = {
    "act_bits": 16, "act_data_type": "float", "act_dynamic": True, "act_sym": True, "rotation_config": None,
    "super_bits": None, "super_group_size": None,
}  # fmt: skip


@dataclass(frozen=True)
class LayerSetting:
    """How layers are quantized, in auto-round's terms. None: as other layers are."""

    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    data_type: str | None = None

    @classmethod
    def read(cls, entry: Mapping[str, Any], sym: bool) -> LayerSetting:
        """Read one entry of `layers`, in which a scheme stands for its values.

        `sym` is the recipe's: 8 bits are symmetric unless the entry itself says otherwise.
        """
        setting = cls(*(entry.get(key) for key in ("bits", "group_size", "sym", "data_type")))
        if match := SCHEME.fullmatch(str(entry.get("scheme", "")).upper()):
            setting = setting.over(cls(int(match["bits"]), int(match["group_size"] or 128), True))
        return setting.over(cls(sym=True)) if setting.bits == 8 and not sym else setting

    @property
    def is_kept(self) -> bool:
        """Whether layers with this setting stay in 16 bits."""
        return self.bits is not None and self.bits >= 16

    def over(self, other: LayerSetting) -> LayerSetting:
        """Return this setting, with the values of another one where it has none."""
        return LayerSetting(**{**other.to_json(), **self.to_json()})

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}

    def differences(self, other: LayerSetting) -> dict[str, Any]:
        """Return the values that another setting does not have."""
        return {key: value for key, value in self.to_json().items() if value != getattr(other, key)}


FULL_PRECISION = LayerSetting(bits=16, data_type="fp")


@dataclass(frozen=True)
class LayerSelection:
    """Which linear layers are quantized, and the quantization config.

    `quantization` is config.json's quantization_config. `why` has the reason for each matrix of a block that is not
    quantized. `notes` and `problems` are sentences. `own_group` names the quantized layers that `layers` of the recipe
    gives a group size.
    """

    quantized: tuple[str, ...]
    quantization: QuantizationConfig
    why: dict[str, str]
    notes: list[str]
    problems: list[str]
    own_group: frozenset[str] = frozenset()


def choose_layers(base: Checkpoint, asked: Quantize) -> LayerSelection:
    """Apply auto-round's rule and the recipe's `layers` to a base in BF16 whose fused experts are split."""
    bits, group_size, sym = asked.resolved
    default = LayerSetting(bits, group_size, sym, "int")
    head = set(base.head.names if base.head else ())
    linear = {name: tensor for name, tensor in linear_layers(base.tensors.values()) if tensor.name not in head}
    odd = {name for name, tensor in linear.items() if any(side % 32 for side in tensor.shape)}
    notes: list[str] = []
    entries = {key: LayerSetting.read(entry, sym) for key, entry in asked.layers.items() if is_pattern(key)}
    if base.config.get("tie_word_embeddings") or base.text_config.get("tie_word_embeddings"):
        entries.pop("lm_head", None)
    own, patterns = _overrides(entries, linear, odd, notes)
    settings = {name: own.get(name, default).over(default) for name in linear}
    settings |= {name: FULL_PRECISION.over(settings[name]) for name in odd}
    asked_for = {name for name, s in settings.items() if not s.is_kept and (block_of(name) or name in own)}
    outside = sorted(name for name in asked_for if not block_of(name))
    widths = {settings[name].bits or bits for name in asked_for} | {s.bits or bits for s in patterns.values()}
    packing = packing_format(asked.format, bits, sym, widths)
    problems = _impossible(asked, packing, widths)
    problems += _outside(outside, vision=isinstance(base.config.get("vision_config"), dict))
    why = {name: "its sides are no multiples of 32" for name in odd if block_of(name)}
    why |= {name: KEPT for name, setting in settings.items() if setting.is_kept and name not in odd}

    extra = {name: settings[name].differences(default) for name in linear if block_of(name)}
    extra |= {name: {**OUTSIDE, "act_group_size": group_size, **settings[name].to_json()} for name in outside}
    extra |= {regex: setting.differences(default) for regex, setting in patterns.items()}
    if any("expert" in name for name in linear):
        names = linear_names(base.tensors.values())
        routers = (name for name in names if ROUTER_SUFFIX.search(name) and f"{name}.weight" not in head)
        extra |= {standard_regex(name): {"bits": 16, "data_type": "float"} for name in routers}
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
        **({"lr": asked.lr, "minmax_lr": asked.lr} if _lr_is_recorded(asked) else {}),
        "packing_format": packing,
        "quant_method": "auto-round",
        "sym": sym,
    }
    if not document["extra_config"]:
        del document["extra_config"]
    quantized = tuple(name for name in linear if name in asked_for)
    own_group = frozenset(name for name in quantized if name in own and own[name].group_size is not None)
    return LayerSelection(quantized, QuantizationConfig(document), why, notes, problems, own_group)


def linear_layers(tensors: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the modules that are a Linear, as far as name and shape show, each with its weight."""
    for tensor in tensors:
        module, _, last = tensor.name.rpartition(".")
        if last == "weight" and len(tensor.shape) == 2 and not NO_LINEAR.search(module):
            yield module, tensor


def linear_names(tensors: Iterable[Tensor]) -> list[str]:
    """Return the names of all modules whose weight is a matrix."""
    return [t.name.removesuffix(".weight") for t in tensors if t.name.endswith(".weight") and len(t.shape) == 2]


def standard_regex(key: str) -> str:
    """Turn a name in `layers` into auto-round's regex (to_standard_regex in auto_round/utils/common.py)."""
    if not any(mark in key for mark in (".*", "^", "$", "|", "(", ")", "[", "]", "?", "+")):
        return f".*{re.escape(key)}.*"
    pattern = re.sub(r"\.(?!\*)", r"\\.", key)
    if not pattern.startswith(("^", ".*")):
        pattern = f".*{pattern}"
    return pattern if pattern.endswith(("$", ".*")) else f"{pattern}.*"


def is_pattern(key: str) -> bool:
    """Check whether a name in `layers` is a regular expression, as auto-round reads it."""
    try:
        re.compile(standard_regex(key))
    except re.error:
        return False
    return True


def _overrides(
    entries: Mapping[str, LayerSetting], linear: Mapping[str, Tensor], odd: set[str], notes: list[str]
) -> tuple[dict[str, LayerSetting], dict[str, LayerSetting]]:
    """Resolve `layers`: the setting of each layer that it names, and those of its patterns, by auto-round's regex.

    A pattern takes precedence over a name, and a later pattern over an earlier one. All layers that a pattern matches
    share one setting in auto-round: if one of them cannot be quantized, all of them are kept.
    """
    own = {name: setting for name, setting in entries.items() if name in linear}
    patterns: dict[str, LayerSetting] = {}
    for key, setting in entries.items():
        if key in linear:
            continue
        regex = standard_regex(key)
        patterns[regex] = setting
        matched = [name for name in linear if re.search(regex, name)]
        stuck = [name for name in matched if name in odd]
        if stuck and not setting.is_kept and len(stuck) < len(matched):
            notes.append(
                f"quantize.layers {key!r}: auto-round keeps all {len(matched)} layers that it names in 16 bits, "
                f"because {stuck[0]} is one of them, whose sides are no multiples of 32: name the others alone"
            )
        own |= dict.fromkeys(matched, FULL_PRECISION.over(setting) if stuck else setting)
    return own, patterns


def _containers(linear: Iterable[str], packs_head: bool) -> str | list[str]:
    """Return the names of the lists of blocks, such as `model.layers`; one name is no list in auto-round's config."""
    blocks = (block_of(name) for name in linear)
    names = list(dict.fromkeys(block.rpartition(".")[0] for block in blocks if block))
    names += ["mtp.layers"] if packs_head else []
    return names[0] if len(names) == 1 else names


def _packs_head(base: Checkpoint, patterns: Mapping[str, LayerSetting]) -> bool:
    """Check whether a pattern makes auto-round pack a part of an `mtp` head, which Requant then leaves out."""
    head = split_fused_experts(base, head_too=True).head
    inside = [module for module in (head.modules if head else ()) if module.startswith("mtp.layers.")]
    return any(not s.is_kept and re.search(regex, module) for regex, s in patterns.items() for module in inside)


def _lr_is_recorded(asked: Quantize) -> bool:
    """Check whether auto-round writes the learning rate: only where it is not the default."""
    return asked.lr is not None and asked.lr != (1.0 / asked.iters if asked.iters else 5e-3)


def _impossible(asked: Quantize, packing: str, widths: set[int]) -> list[str]:
    """Find settings of single layers that auto-round refuses, some of them only after hours."""
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
    """Say that layers outside the decoder blocks cannot be quantized. Without vision, auto-round can do `lm_head`."""
    foreign = [name for name in names if vision or name != "lm_head"]
    if not foreign:
        return []
    return [
        f"quantize.layers asks to quantize {foreign[0]}, which lies in no decoder block: auto-round "
        f"{locked_version('auto-round')} cannot{' of a base with vision' if vision else ''}: name layers of blocks, "
        "for instance layers.*mlp"
    ]
