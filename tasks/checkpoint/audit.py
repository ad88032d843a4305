"""Accounts for every tensor and file of a quantized checkpoint against its base: packed, or bit-identical."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from requant.tasks.artifact import REWRITTEN, sha256_of
from requant.tasks.checkpoint.assemble import packed_parts
from requant.tasks.checkpoint.checkpoint import QUANTIZATION, Checkpoint, read_json
from requant.tasks.checkpoint.data_checks import is_finite
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.mtp import without_layer_count
from requant.tasks.checkpoint.packing import PackingScheme, check_parts
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

# What says how long a text may be, and where its tokens are.
CONTEXT = (
    "max_position_embeddings", "original_max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "sliding_window", "layer_types",
)  # fmt: skip
DTYPE_KEYS = ("dtype", "torch_dtype")  # the second is the earlier name of the first
# Keys of config.json that change nothing that is measured: who wrote it, with what, and what a library does by default.
BOOKKEEPING = {
    "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path", "_model_name_or_path",
    "_commit_hash", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "problem_type", "id2label",
    "label2id", "tokenizer_class", "processor_class", "pad_token_id",
}  # fmt: skip
# In a tokenizer's or processor's own file they decide what is loaded.
CLASS_KEYS = {"tokenizer_class", "processor_class"}
QUANTIZATION_KEYS = {"quantization_config", "compression_config"}
OWN_FILES = {"config.json", QUANTIZATION, *REWRITTEN}


@dataclass
class Account:
    """What was found; every list holds sentences, and all are empty for a checkpoint that Requant made. `differences`
    are those that change nothing that is measured; each of the others keeps the checkpoint from being sound."""

    packed: int = 0
    kept: int = 0
    head: int = 0
    unaccounted: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    context: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def account(
    quantized: Checkpoint,
    base: Checkpoint,
    *,
    with_head: bool,
    pack_head: bool = False,
    completed: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda config: None,
) -> Account:
    """Compare a quantized checkpoint with its base. Reads all tensors of both once, a chunk at a time.

    What is FP8 in the base must be packed, or BF16 as the base's scales have it, and no scale may be left of it.
    Experts that lie fused in the base may lie there one by one.
    `pack_head`: the head was asked for with packed layers, and has them.
    `completed`: makes of a config what a model is built from, with defaults and under today's names, as
    `completed_config` of tasks/validating/model.py does.
    """
    base = dequantize_fp8(split_fused_experts(base, quantized.tensors, head_too=True))
    found = Account(unaccounted=list(quantized.problems))
    quantization = quantized.config.get("quantization_config") or {}
    parts = packed_parts(quantized.tensors.values())
    head_names = set(base.head.names if base.head else ())
    seen: set[str] = set()
    for name, source in base.tensors.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and module in parts and name not in quantized.tensors:
            found.packed += 1
            if name in head_names and not pack_head:
                found.altered.append(f"{module} of the MTP head is packed")
            seen.update(t.name for t in parts[module].values())
            _check_packed(found, module, source, parts[module], quantization)
        elif name in quantized.tensors:
            seen.add(name)
            if name in head_names and not with_head:
                found.unaccounted.append(f"{name} is there, and the head was to be dropped")
            found.head += name in head_names
            found.kept += name not in head_names
            _check_kept(found, quantized.tensors[name], source)
        elif with_head or name not in head_names:
            found.unaccounted.append(f"{name} of the base is missing")
    found.unaccounted += [f"{name} is not in the base" for name in quantized.tensors if name not in seen]
    if not found.packed:
        found.unaccounted.append("no tensor is quantized")
    _check_config(found, quantized, base, with_head, completed)
    _check_files(found, quantized.folder, base.folder)
    return found


def _check_packed(
    found: Account, module: str, weight: Tensor, parts: Mapping[str, Tensor], quantization: Mapping[str, Any]
) -> None:
    try:
        wrong = check_parts(module, parts, PackingScheme.of(quantization, module), weight.shape)
    except CheckpointError as error:
        wrong = str(error)
    if wrong:
        found.unaccounted.append(wrong)
    elif not all(is_finite(chunk, parts["scales"].dtype) for chunk in parts["scales"].chunks()):
        found.not_finite.append(f"{module}.scales")


def _check_kept(found: Account, tensor: Tensor, source: Tensor) -> None:
    if (tensor.dtype, tensor.shape) != (source.dtype, source.shape):
        found.altered.append(
            f"{tensor.name} is {tensor.dtype} {tensor.shape}, in the base {source.dtype} {source.shape}"
        )
        return
    same = sound = True
    for ours, theirs in zip(tensor.chunks(), source.chunks(), strict=True):
        same = same and ours == theirs
        sound = sound and is_finite(ours, tensor.dtype)
    if not same:
        found.altered.append(f"{tensor.name} differs from the base's")
    if not sound:
        found.not_finite.append(tensor.name)


def _check_config(
    found: Account,
    quantized: Checkpoint,
    base: Checkpoint,
    with_head: bool,
    completed: Callable[[dict[str, Any]], dict[str, Any] | None],
) -> None:
    """What differs and is computed with is unaccounted for; what only says the same otherwise is a difference.

    So is the type that engines compute in: measuring takes it from the base."""
    stated = base.config if with_head or base.head is None else without_layer_count(base.config)
    ours, theirs = (
        {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
        for config in (quantized.config, stated)
    )
    mine, others = _computed(ours), _computed(theirs)
    computed = _differing(mine, others)
    if computed:  # unless defaults are left out in one of them, or keys have other names
        built = [whole for config in (ours, theirs) if (whole := completed(config)) is not None]
        if len(built) == 2:
            mine, others = map(_computed, built)
            computed = _differing(mine, others)
    found.unaccounted += [f"config.json differs from the base's in {key}" for key in computed]
    told = (
        _difference(place, ours, theirs)
        for key in _differing(ours, theirs)
        if key not in computed
        for place in _places(key, ours.get(key), theirs.get(key))
    )
    found.differences += dict.fromkeys(told)
    texts = [
        config["text_config"] if isinstance(config.get("text_config"), dict) else config for config in (mine, others)
    ]
    for key in CONTEXT:
        said, wanted = (text.get(key) for text in texts)
        if said != wanted:
            found.context.append(f"config.json says {key} {shown(str(said))}, the base's {shown(str(wanted))}")


def _differing(ours: Any, theirs: Any) -> list[str]:
    """The keys in which two objects differ; a key that is not there is one that is null."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return [] if ours == theirs else [""]
    return [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]


def _places(key: str, ours: Any, theirs: Any) -> list[str]:
    """What differs below a key, by its whole name; the key itself where it has no parts."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return [key]
    return [
        place
        for part in _differing(ours, theirs)
        for place in _places(f"{key}.{part}", ours.get(part), theirs.get(part))
    ]


def _difference(place: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Say what a difference does that is no part of the structure."""
    *parents, key = place.split(".")
    if key in DTYPE_KEYS:
        said, wanted = _dtype(ours, parents), _dtype(theirs, parents)
        if said != wanted:
            name = ".".join([*parents, DTYPE_KEYS[0]])
            mine = f"says {name} {said}" if said else f"says no {name}"
            return f"config.json {mine}, the base's {wanted or 'none'}: engines choose by it what they compute in"
    return f"config.json differs from the base's in {place}, which changes nothing that is computed"


def _dtype(config: Any, parents: Sequence[str]) -> str | None:
    """The type that a part of a config names, under either name."""
    for parent in parents:
        config = config.get(parent) if isinstance(config, dict) else None
    said = [config[key] for key in DTYPE_KEYS if config.get(key) is not None] if isinstance(config, dict) else []
    return shown(str(said[0]).removeprefix("torch.")) if said else None


def _computed(value: Any) -> Any:
    """A config without what changes nothing that is computed, in its parts too."""
    if isinstance(value, dict):
        return {
            key: _computed(each)
            for key, each in value.items()
            if key not in BOOKKEEPING | QUANTIZATION_KEYS and each is not None
        }
    return value


def _check_files(found: Account, ours: Path, base: Path) -> None:
    """Every other file of the base must be there, byte for byte."""
    for path in _other_files(base):
        if not (ours / path).is_file():
            found.files.append(f"{path} of the base is missing")
        elif sha256_of(ours / path) != sha256_of(base / path):
            keys = _bookkeeping_keys(ours / path, base / path) if path.endswith(".json") else []
            if keys:
                found.differences.append(f"{path} differs from the base's in {', '.join(keys)} alone")
            else:
                found.files.append(f"{path} differs from the base's")


def _bookkeeping_keys(ours: Path, base: Path) -> list[str]:
    """The keys in which two JSON objects differ, if they are bookkeeping; none if there are others, or no keys."""
    try:
        mine, theirs = read_json(ours), read_json(base)
    except CheckpointError:
        return []
    keys = _differing(mine, theirs)
    return keys if (BOOKKEEPING - CLASS_KEYS).issuperset(keys) else []


def _other_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        weights = name.endswith((".safetensors", ".index.json"))
        if path.is_file() and not weights and name not in OWN_FILES and not name.startswith("."):
            yield name
