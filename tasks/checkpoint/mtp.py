"""The MTP head: which tensors it is made of, and what the configs must say about it.

Two layouts: `mtp.*` beside the main model (Qwen3.5, Qwen3.6, counted by `mtp_num_hidden_layers`), and decoder layers
inlined behind the last one (DeepSeek, GLM: `model.layers.{num_hidden_layers + i}`, counted by
`num_nextn_predict_layers`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import modules_of
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

LAYER_COUNTS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
_LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")
FUSED_EXPERTS = {"gate_up_proj", "down_proj"}  # 3-D parameters of an `experts` module
FULL_PRECISION = {"bits": 16, "data_type": "fp"}  # auto-round's words for "not quantized"
# Values of quant_method by the words that their configs have for modules that are not quantized.
AUTO_ROUND_METHODS = frozenset({"auto-round", "inc"})
GPTQ_METHODS = frozenset({"gptq", "gptq_marlin", "auto_gptq"})
AWQ_METHODS = frozenset({"awq", "awq_marlin", "auto_awq"})
FP8_METHODS = frozenset({"fp8", "fbgemm_fp8"})


@dataclass(frozen=True)
class Head:
    """The head's tensor names, sorted, and its layout: `mtp` or `inlined`."""

    layout: str
    names: tuple[str, ...]

    @property
    def modules(self) -> list[str]:
        """Names of the head's linear modules as far as names tell: everything with a weight but norms."""
        stems = {n.rpartition(".")[0] for n in self.names if n.rpartition(".")[2] in {"weight", "qweight"}}
        return sorted(s for s in stems if "norm" not in s.rpartition(".")[2])

    @property
    def prefixes(self) -> list[str]:
        """Module prefixes under which all of the head lies: `mtp`, or `model.layers.N` for each inlined layer."""
        if self.layout == "mtp":
            return sorted({n[: n.index("mtp") + 3] for n in self.names})
        return sorted({m.group(0).rstrip(".") for n in self.names if (m := _LAYER.match(n))})


def layer_count(text_config: Mapping[str, Any]) -> int:
    """How many MTP layers the config promises; 0 if it says nothing."""
    counts = (text_config.get(key) for key in LAYER_COUNTS)
    return max((count for count in counts if type(count) is int), default=0)


def find_head(names: Iterable[str], text_config: Mapping[str, Any]) -> Head | None:
    """The head among these tensor names, or None."""
    names = list(names)
    apart = sorted(n for n in names if re.match(r"^(?:model\.)?mtp\.", n))
    if apart:
        return Head("mtp", tuple(apart))
    layers = text_config.get("num_hidden_layers")
    if not isinstance(layers, int) or not layer_count(text_config):
        return None
    inlined = sorted(n for n in names if (m := _LAYER.match(n)) and int(m.group(1)) >= layers)
    return Head("inlined", tuple(inlined)) if inlined else None


def unquantized_entries(head: Head, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """`extra_config` entries that keep every engine from expecting packed weights in the head.

    Exact names for vLLM's dense layers, a regex for its fused and expert layers (which ignore exact names) and for
    SGLang, which matches with re.fullmatch.
    """
    linear = [m for m in head.modules if f"{m}.weight" in tensors and len(tensors[f"{m}.weight"].shape) >= 2]
    return {key: dict(FULL_PRECISION) for key in (*_patterns(head), *linear, *_fused_experts(head))}


def _patterns(head: Head) -> list[str]:
    """Regexes for all of the head and nothing else."""
    if head.layout == "mtp":
        return [".*mtp.*"]
    return [f".*{re.escape(prefix)}\\..*" for prefix in head.prefixes]


def without_head_entries(quantization: Mapping[str, Any], head: Head | None) -> dict[str, Any]:
    """A quantization config whose `extra_config` says nothing of the head."""
    document = copy.deepcopy(dict(quantization))
    extra = document.get("extra_config")
    if isinstance(extra, dict) and head is not None:
        document["extra_config"] = {
            key: value
            for key, value in extra.items()
            if not any(re.search(rf"{re.escape(p)}(?!\d)", key.replace("\\", "")) for p in head.prefixes)
            and "mtp" not in key
        }
    return document


def with_head_entries(quantization: Mapping[str, Any], head: Head, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A quantization config that says of the head what its tensors are: not quantized, or its own layers packed.

    Each method has its own words for that: auto-round's `extra_config`; GPTQ's `dynamic`, whose `-:` rules turn
    quantization off; compressed-tensors' `ignore`; AWQ's and FP8's `modules_to_not_convert`. Raises CheckpointError for
    a method whose words are not known here: another method's words would promise what no engine reads.
    """
    document = without_head_entries(quantization, head)
    method = str(document.get("quant_method", "")).lower().replace("compressed_tensors", "compressed-tensors")
    if method in GPTQ_METHODS:
        rules: dict[str, Any] = {f"-:{pattern}": {} for pattern in _patterns(head)}
        document["dynamic"] = {**rules, **_mapping(document.get("dynamic"))}
    elif method == "compressed-tensors":
        document["ignore"] = _with(document.get("ignore"), [f"re:{pattern}" for pattern in _patterns(head)])
    elif method in {*AWQ_METHODS, *FP8_METHODS}:
        keys = ["modules_to_not_convert"]
        if method in FP8_METHODS and document.get("ignored_layers"):
            keys.append("ignored_layers")  # where vLLM finds it, it does not look at the other
        if method in AWQ_METHODS and not document.get(keys[0]):
            document[keys[0]] = _plain_matrices(tensors, head)  # as vLLM takes them from the tensors without a list
        for key in keys:
            document[key] = _with(_of_others(document.get(key), head), _unconverted(head, tensors))
    elif method in AUTO_ROUND_METHODS:
        packed = packed_entries(head, tensors, document)
        plain = unquantized_entries(head, tensors)
        kept = {key: value for key, value in plain.items() if not packed or key not in _patterns(head)}
        document["extra_config"] = {**_mapping(document.get("extra_config")), **kept, **packed}
    else:
        raise CheckpointError(
            f"quant_method is {shown(repr(quantization.get('quant_method')))}, and Requant does not know how its "
            "config says that an MTP head is not quantized: add the head's modules to that method's own list by hand"
        )
    return document


def _plain_matrices(tensors: Mapping[str, Tensor], head: Head) -> list[str]:
    """Modules outside the head with matrices, none of them packed."""
    matrices = [t for name, t in tensors.items() if name not in head.names and len(t.shape) >= 2]
    packed = {t.name.rpartition(".")[0] for t in tensors.values() if t.dtype not in {"F16", "BF16", "F32"}}
    return sorted({t.name.rpartition(".")[0] for t in matrices} - packed)


def _unconverted(head: Head, tensors: Mapping[str, Tensor]) -> list[str]:
    """The head's modules that are not quantized, by their exact names, as FP8 in vLLM wants them: fused experts by the
    name of their module too. The head's prefixes stand for all of it only where nothing in it is quantized."""
    modules = modules_of(tensors[name] for name in head.names if name in tensors)
    plain = [name for name in head.modules if name in modules and not modules[name].quantized]
    everything = not any(module.quantized for module in modules.values())
    return [*(head.prefixes if everything else []), *plain, *_fused_experts(head)]


def _fused_experts(head: Head) -> list[str]:
    """The modules whose experts lie fused in 3-D tensors, as `mtp.layers.0.mlp.experts`."""
    return sorted({name.rpartition(".")[0] for name in head.names if name.rpartition(".")[2] in FUSED_EXPERTS})


def _of_others(value: Any, head: Head) -> list[Any]:
    """The entries of a list that name no part of the head: what they said of it may not be true any more."""
    entries = value if isinstance(value, list) else []
    below = tuple(f"{prefix}." for prefix in head.prefixes)
    return [e for e in entries if not (isinstance(e, str) and (e in head.prefixes or e.startswith(below)))]


def packed_entries(
    head: Head, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """`extra_config` entries for the packed layers of a head, told from the shapes of their parts."""
    entries = {}
    for module in head.modules:
        packed, scales = tensors.get(f"{module}.qweight"), tensors.get(f"{module}.scales")
        if packed is None or scales is None:
            continue
        along_input = packed.shape[1] == scales.shape[1]  # GPTQ; AWQ packs along the output
        bits = 32 * packed.shape[0] // (scales.shape[0] * _group_size(quantization)) if along_input else 4
        entries[module] = {"bits": bits, "group_size": quantization.get("group_size"), "sym": True, "data_type": "int"}
    return entries


def _group_size(quantization: Mapping[str, Any]) -> int:
    size = quantization.get("group_size")
    return size if type(size) is int and size > 0 else 1


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _with(value: Any, names: list[str]) -> list[Any]:
    there = value if isinstance(value, list) else []
    return [*there, *(name for name in names if name not in there)]


def without_layer_count(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model config that promises no head: every MTP layer count is 0."""
    document = copy.deepcopy(dict(config))
    parts = [document, *(v for v in document.values() if isinstance(v, dict))]
    for part in parts:
        for key in LAYER_COUNTS:
            if key in part:
                part[key] = 0
    return document
