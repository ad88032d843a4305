"""Writes what a quantization config must say about an MTP head that is not quantized, in the words of each method."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.methods import (
    AUTO_ROUND_METHODS,
    AWQ_METHODS,
    FP8_METHODS,
    GPTQ_METHODS,
    MODELOPT_METHODS,
    QUARK_METHODS,
)
from requant.tasks.checkpoint.modules import modules_of
from requant.tasks.checkpoint.mtp import Head
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.checkpoint.writer import Computed
from requant.tasks.errors import CheckpointError

FUSED_EXPERTS = {"gate_up_proj", "down_proj"}  # names of 3-D parameters
# Layers that engines fuse of several modules. A list that names such a layer must name all of its modules.
FUSED_LAYERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
FULL_PRECISION = {"bits": 16, "data_type": "fp"}  # says in a config of auto-round that a layer is not quantized
BLOCK_LISTS = ("block_name_to_quantize", "to_quant_block_names")  # auto-round's names for one field


def unquantized_entries(head: Head, tensors: Mapping[str, Tensor]) -> dict[str, JsonObject]:
    """Return the entries of `extra_config` that tell every engine that the head is not quantized.

    These are exact names for vLLM's dense layers, and a regular expression both for vLLM's fused and expert layers,
    which ignore exact names, and for SGLang, which uses re.fullmatch.
    """
    linear = [m for m in head.modules if f"{m}.weight" in tensors and len(tensors[f"{m}.weight"].shape) >= 2]
    return {key: JsonObject(FULL_PRECISION) for key in (*_patterns(head), *linear, *_fused_experts(head))}


def _patterns(head: Head) -> list[str]:
    """Return regular expressions that match all modules of the head and no other module."""
    if head.layout == "mtp":
        return [".*mtp.*"]
    return [f".*{re.escape(prefix)}\\..*" for prefix in head.prefixes]


def without_head_entries(quantization: QuantizationConfig, head: Head | None) -> QuantizationConfig:
    """Return a copy of a quantization config of auto-round that does not speak of the MTP head.

    Its `extra_config` has no entries for the head, and its list of blocks to quantize does not name the head's layers.
    """
    document = copy.deepcopy(quantization)
    if head is None:
        return document
    extra = document.child("extra_config")
    if extra is not None:
        document["extra_config"] = {
            key: value
            for key, value in extra.items()
            if not any(re.search(rf"{re.escape(p)}(?!\d)", key.replace("\\", "")) for p in head.prefixes)
            and "mtp" not in key
        }
    for key in BLOCK_LISTS:
        blocks = document.get(key)
        listed = blocks.split(",") if isinstance(blocks, str) else blocks
        kept = _without_head(listed, head)
        if kept and kept != listed:  # an empty list would mean all blocks
            document[key] = ",".join(map(str, kept)) if isinstance(blocks, str) else kept
    return document


def with_head_entries(
    quantization: QuantizationConfig, head: Head, tensors: Mapping[str, Tensor]
) -> QuantizationConfig:
    """Return a copy of a quantization config that says which of the head's modules are quantized.

    Each method has its own field for that: auto-round has `extra_config`; GPTQ has `dynamic`, whose `-:` rules turn
    quantization off; compressed-tensors has `ignore`; AWQ and FP8 have `modules_to_not_convert`; ModelOpt has `ignore`
    or, in its older form, `quantization.exclude_modules`; quark has `exclude`. Raises CheckpointError for any other
    method, as no engine would read another method's field, and for a field of the wrong type.
    """
    document = without_head_entries(quantization, head)
    method = document.method
    if method in GPTQ_METHODS:
        rules = {f"-:{pattern}": JsonObject() for pattern in _patterns(head)}
        document["dynamic"] = {**rules, **(document.child("dynamic") or {})}
    elif method == "compressed-tensors":
        _add(document, "ignore", [f"re:{pattern}" for pattern in _patterns(head)])
    elif method in QUARK_METHODS:
        _replace_entries(document, "exclude", head, _excluded_by_quark(head, tensors))
    elif method in MODELOPT_METHODS:
        document = with_modelopt_entries(document, head, tensors)
    elif method in {*AWQ_METHODS, *FP8_METHODS}:
        keys = ["modules_to_not_convert"]
        if method in FP8_METHODS and document.get("ignored_layers"):
            keys.append("ignored_layers")  # vLLM reads modules_to_not_convert only without ignored_layers
        if method in AWQ_METHODS and not document.get(keys[0]):
            document[keys[0]] = _plain_matrices(tensors, head)  # vLLM takes them from the tensors if there is no list
        for key in keys:
            document[key] = _with(_without_head(document.get(key), head), _unconverted(head, tensors))
    elif method in AUTO_ROUND_METHODS:
        quantized = quantized_entries(head, tensors, quantization)
        unquantized = unquantized_entries(head, tensors)
        if quantized:  # the patterns would match the quantized layers too
            unquantized = {key: value for key, value in unquantized.items() if key not in _patterns(head)}
        document["extra_config"] = {**(document.child("extra_config") or {}), **unquantized, **quantized}
    else:
        raise CheckpointError(
            f"quant_method is {shown(repr(quantization.get('quant_method')))}, and Requant does not know how its "
            "config says that an MTP head is not quantized: add the head's modules to that method's own list by hand"
        )
    return document


def with_modelopt_entries(
    quantization: QuantizationConfig, head: Head, tensors: Mapping[str, Tensor]
) -> QuantizationConfig:
    """Return a copy of a ModelOpt config that leaves the head out, as it stands in config.json or in MODELOPT_FILE.

    The entries are wildcards and names: vLLM compares a fused layer's modules by name, and all other layers by
    `fnmatch`; SGLang turns an entry into a regular expression. Sources: vLLM 0.32.0, layers/quantization/modelopt.py
    (ModelOptQuantConfigBase.from_config, is_layer_excluded, apply_vllm_mapper); SGLang 0.5.23,
    layers/quantization/modelopt_quant.py (is_layer_excluded).
    """
    document = copy.deepcopy(quantization)
    older = document.child("quantization")
    unquantized, is_whole = _unquantized_modules(head, tensors)
    wildcards = [f"{prefix}*" if head.layout == "mtp" else f"{prefix}.*" for prefix in head.prefixes]
    names = [*(wildcards if is_whole else []), *unquantized]
    if older is None:
        _replace_entries(document, "ignore", head, names)
    else:
        _replace_entries(older, "exclude_modules", head, names)
        document["quantization"] = older
    return document


def _excluded_by_quark(head: Head, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the entries of quark's `exclude` for the head.

    An entry is a name, or a regular expression behind `re:`. Sources: vLLM 0.32.0, layers/quantization/quark/utils.py
    (should_ignore_layer); SGLang 0.5.23, the same file there.
    """
    unquantized, is_whole = _unquantized_modules(head, tensors)
    return [*([f"re:{pattern}" for pattern in _patterns(head)] if is_whole else []), *unquantized]


def _unquantized_modules(head: Head, tensors: Mapping[str, Tensor]) -> tuple[list[str], bool]:
    """Return the head's modules that are not quantized, and whether these are all of its modules.

    Modules that engines fuse are followed by the name of the fused layer, and fused experts are named too.
    """
    modules = modules_of(tensors[name] for name in head.names if name in tensors)
    plain = [name for name in head.modules if name in modules and not modules[name].quantized]
    stems = sorted({name.rpartition(".")[0] for name in plain})
    fused = [
        f"{stem}.{layer}"
        for stem in stems
        for layer, parts in FUSED_LAYERS.items()
        if all(f"{stem}.{part}" in plain for part in parts)
    ]
    return [*plain, *fused, *_fused_experts(head)], not any(module.quantized for module in modules.values())


def _plain_matrices(tensors: Mapping[str, Tensor], head: Head) -> list[str]:
    """Return the modules outside the head that have matrices and are not quantized."""
    matrices = [t for name, t in tensors.items() if name not in head.names and len(t.shape) >= 2]
    packed = {t.name.rpartition(".")[0] for t in tensors.values() if t.dtype not in {"F16", "BF16", "F32"}}
    return sorted({t.name.rpartition(".")[0] for t in matrices} - packed)


def _unconverted(head: Head, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the head's modules that are not quantized.

    vLLM's FP8 needs exact names, for fused experts too. The head's prefixes are added if nothing in it is quantized.
    """
    unquantized, is_whole = _unquantized_modules(head, tensors)
    return [*(head.prefixes if is_whole else []), *unquantized]


def _fused_experts(head: Head) -> list[str]:
    """Return the modules with fused experts, as `mtp.layers.0.mlp.experts`."""
    return sorted({name.rpartition(".")[0] for name in head.names if name.rpartition(".")[2] in FUSED_EXPERTS})


def _without_head(value: object, head: Head) -> list[object]:
    """Return the entries of a list that do not name a part of the head. `mtp*` and `mtp.*` name all of it."""
    entries = value if isinstance(value, list) else []
    below = tuple(f"{prefix}." for prefix in head.prefixes)
    own = {*head.prefixes, *(f"{prefix}*" for prefix in head.prefixes), *(f"re:{p}" for p in _patterns(head))}
    return [e for e in entries if not (isinstance(e, str) and (e in own or e.startswith(below)))]


def quantized_entries(
    head: Head, tensors: Mapping[str, Tensor], quantization: QuantizationConfig
) -> dict[str, JsonObject]:
    """Return the entries of `extra_config` for the packed layers of a head, as the shapes of their parts are.

    A head that `pack` has just made is symmetric. Of any other one only the config knows, which `quantization` is.
    """
    entries: dict[str, JsonObject] = {}
    like = PackingScheme(4, quantization.integer("group_size") or 0)
    extra = quantization.child("extra_config") or JsonObject()
    for name, module in modules_of(tensors[name] for name in head.names if name in tensors).items():
        scheme = PackingScheme.of_parts(module.packed_parts, like)
        if scheme is None:
            continue
        made_here = isinstance(module.parts["qweight"], Computed)
        sym = True if made_here else (extra.child(name) or quantization).get("sym", quantization.get("sym", True))
        entries[name] = JsonObject(bits=scheme.bits, group_size=scheme.group_size, sym=sym, data_type="int")
    return entries


def _add(document: JsonObject, key: str, names: list[str]) -> None:
    """Append names to a list of a config. Raises CheckpointError if there is something else than a list."""
    value = document.get(key)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"{key} of quantization_config is {shown(repr(value))}, and no list: correct it by hand")
    document[key] = _with(value, names)


def _replace_entries(document: JsonObject, key: str, head: Head, names: list[str]) -> None:
    """Replace what a list of a config says of the head. Raises as `_add` does."""
    if isinstance(document.get(key), list):
        document[key] = _without_head(document[key], head)
    _add(document, key, names)


def _with(value: object, names: list[str]) -> list[object]:
    """Append those of the names that a list lacks. A value that is not a list counts as an empty one."""
    entries = value if isinstance(value, list) else []
    return [*entries, *(name for name in names if name not in entries)]
