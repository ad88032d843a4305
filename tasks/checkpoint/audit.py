"""Compares every tensor and file of a quantized checkpoint with its base: each must be quantized or identical."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from requant.tasks.artifact import REWRITTEN, sha256_of
from requant.tasks.checkpoint.checkpoint import QUANTIZATION, Checkpoint, read_json
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.data_checks import is_finite
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.stored_matrix import problem_of, quantized_module, unknown_format
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

# Keys of the context length and of the positions of tokens.
CONTEXT_KEYS = (
    "max_position_embeddings", "original_max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "sliding_window", "layer_types",
)  # fmt: skip
DTYPE_KEYS = ("dtype", "torch_dtype")  # the second is the former name
# Keys of config.json that do not change what the model computes, such as who wrote it and defaults of a library.
BOOKKEEPING = {
    "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path", "_model_name_or_path",
    "_commit_hash", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "problem_type", "id2label",
    "label2id", "tokenizer_class", "processor_class", "pad_token_id", "local_files_only", "is_local",
}  # fmt: skip
# In the files of a tokenizer or processor, these keys decide which class is loaded.
CLASS_KEYS = {"tokenizer_class", "processor_class"}
QUANTIZATION_KEYS = {"quantization_config", "compression_config"}
OWN_FILES = {"config.json", QUANTIZATION, *REWRITTEN}


@dataclass
class Account:
    """The result of the comparison.

    `packed`, `kept` and `head` count quantized matrices, tensors that are the base's, and such tensors of the MTP head.
    Every list holds sentences, and is empty for a checkpoint that Requant made. `differences` do not change what the
    model computes, or name what cannot be compared. An entry of any other list means that the checkpoint is not sound.
    """

    packed: int = 0
    kept: int = 0
    head: int = 0
    unaccounted: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    not_finite_in_base: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    context: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def account(
    quantized: Checkpoint,
    base: Checkpoint,
    *,
    with_head: bool,
    pack_head: bool = False,
    completed: Callable[[ModelConfig], ModelConfig | None] = lambda config: None,
) -> Account:
    """Compare a quantized checkpoint with its base. Reads all tensors of both once, chunk by chunk.

    An FP8 weight of the base must be quantized, or dequantized to BF16 with the base's scales, and its scales must be
    gone. Experts that are fused in the base may be split.

    `with_head`: the MTP head must be there. `pack_head`: the recipe asks for a quantized head.
    `completed`: adds all defaults to a config, and renames old keys, as `completed_config` of tasks/validating/model.py
    does; returns None if it cannot.
    """
    base = dequantize_fp8(split_fused_experts(base, quantized.tensors, head_too=True))
    result = Account(unaccounted=list(quantized.problems))
    head_names = set(base.head.names if base.head else ())
    seen: set[str] = set()
    unknown: list[str] = []
    for name, source in base.tensors.items():
        module = quantized_module(quantized, name)
        if module is not None:
            result.packed += 1
            unknown += filter(None, [unknown_format(quantized, module)])
            if name in head_names and not pack_head:
                result.altered.append(f"{module.name} of the MTP head is packed")
            seen.update(t.name for t in module.quantized_parts.values())
            _check_packed(result, quantized, module, source)
        elif name in quantized.tensors:
            seen.add(name)
            if name in head_names and not with_head:
                result.unaccounted.append(f"{name} is there, and the head was to be dropped")
            result.head += name in head_names
            result.kept += name not in head_names
            _check_kept(result, quantized.tensors[name], source)
        elif with_head or name not in head_names:
            result.unaccounted.append(f"{name} of the base is missing")
    result.unaccounted += [f"{name} is not in the base" for name in quantized.tensors if name not in seen]
    if not result.packed:
        result.unaccounted.append("no tensor is quantized")
    if unknown:
        result.differences.append(f"{len(unknown)} matrices are not compared with the base's: {unknown[0]}")
    _check_config(result, quantized, base, with_head, completed)
    _check_files(result, quantized.folder, base.folder)
    return result


def _check_packed(result: Account, quantized: Checkpoint, module: Module, weight: Tensor) -> None:
    if unknown_format(quantized, module):  # what Requant cannot read is not wrong
        return
    if wrong := problem_of(quantized, module, weight.shape):
        result.unaccounted.append(wrong)
    result.not_finite += [
        tensor.name
        for part, tensor in module.quantized_parts.items()
        if "scale" in part and not all(is_finite(chunk, tensor.dtype) for chunk in tensor.chunks())
    ]


def _check_kept(result: Account, tensor: Tensor, source: Tensor) -> None:
    if (tensor.dtype, tensor.shape) != (source.dtype, source.shape):
        result.altered.append(
            f"{tensor.name} is {tensor.dtype} {tensor.shape}, in the base {source.dtype} {source.shape}"
        )
        return
    same = sound = True
    for ours, theirs in zip(tensor.chunks(), source.chunks(), strict=True):
        same = same and ours == theirs
        sound = sound and is_finite(ours, tensor.dtype)
    if not same:
        result.altered.append(f"{tensor.name} differs from the base's")
    if not sound and same:
        result.not_finite_in_base.append(f"{tensor.name} is not finite in the base either")
    elif not sound:
        result.not_finite.append(tensor.name)


def _check_config(
    result: Account,
    quantized: Checkpoint,
    base: Checkpoint,
    with_head: bool,
    completed: Callable[[ModelConfig], ModelConfig | None],
) -> None:
    """Sort the differences of the configs: those that change what the model computes are unaccounted for.

    The dtype in which engines compute counts as a difference, since measuring takes it from the base.
    """
    expected = base.config if with_head or base.head is None else base.config.without_mtp_layers()
    ours, theirs = (
        ModelConfig({key: value for key, value in config.items() if key not in QUANTIZATION_KEYS})
        for config in (quantized.config, expected)
    )
    our_computed, their_computed = (ModelConfig(_computed(config)) for config in (ours, theirs))
    computed = _differing(our_computed, their_computed)
    if computed:  # one config may leave out defaults, or use old names of keys
        built = [full for config in (ours, theirs) if (full := completed(config)) is not None]
        if len(built) == 2:
            our_computed, their_computed = (ModelConfig(_computed(config)) for config in built)
            computed = _differing(our_computed, their_computed)
    result.unaccounted += [f"config.json differs from the base's in {key}" for key in computed]
    sentences = (
        _difference(place, ours, theirs)
        for key in _differing(ours, theirs)
        if key not in computed
        for place in _places(key, ours.get(key), theirs.get(key))
    )
    result.differences += dict.fromkeys(sentences)
    for key in CONTEXT_KEYS:
        stated, wanted = our_computed.text.get(key), their_computed.text.get(key)
        if stated != wanted:
            result.context.append(f"config.json says {key} {shown(str(stated))}, the base's {shown(str(wanted))}")


def _differing(ours: Any, theirs: Any) -> list[str]:
    """Return the keys in which two objects differ. A missing key equals one that is null."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return [] if ours == theirs else [""]
    return [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]


def _places(key: str, ours: Any, theirs: Any) -> list[str]:
    """Return the paths of the differing values below a key; the key itself if one of its values is not an object."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return [key]
    return [
        place
        for part in _differing(ours, theirs)
        for place in _places(f"{key}.{part}", ours.get(part), theirs.get(part))
    ]


def _difference(place: str, ours: ModelConfig, theirs: ModelConfig) -> str:
    """Describe a difference that does not change what the model computes."""
    *parents, key = place.split(".")
    if key in DTYPE_KEYS:
        stated, wanted = _dtype(ours, parents), _dtype(theirs, parents)
        if stated != wanted:
            name = ".".join([*parents, DTYPE_KEYS[0]])
            mine = f"says {name} {stated}" if stated else f"says no {name}"
            return f"config.json {mine}, the base's {wanted or 'none'}: engines choose by it what they compute in"
    return f"config.json differs from the base's in {place}, which changes nothing that is computed"


def _dtype(config: Any, parents: Sequence[str]) -> str | None:
    """Return the dtype that a part of a config states, under either key."""
    for parent in parents:
        config = config.get(parent) if isinstance(config, dict) else None
    stated = [config[key] for key in DTYPE_KEYS if config.get(key) is not None] if isinstance(config, dict) else []
    return shown(str(stated[0]).removeprefix("torch.")) if stated else None


def _computed(value: Any) -> Any:
    """Return a config, or a part of one, without the keys that do not change what the model computes."""
    if isinstance(value, dict):
        return {
            key: _computed(part)
            for key, part in value.items()
            if key not in BOOKKEEPING | QUANTIZATION_KEYS and part is not None
        }
    return value


def _check_files(result: Account, ours: Path, base: Path) -> None:
    """Check that every other file of the base is there, byte for byte."""
    for path in _other_files(base):
        if not (ours / path).is_file():
            result.files.append(f"{path} of the base is missing")
        elif sha256_of(ours / path) != sha256_of(base / path):
            keys = _bookkeeping_keys(ours / path, base / path) if path.endswith(".json") else []
            if keys:
                result.differences.append(f"{path} differs from the base's in {', '.join(keys)} alone")
            else:
                result.files.append(f"{path} differs from the base's")


def _bookkeeping_keys(ours: Path, base: Path) -> list[str]:
    """Return the keys in which two JSON files differ, if all of them are bookkeeping; otherwise none."""
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
