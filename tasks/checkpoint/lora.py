"""Reads a LoRA adapter of peft, without torch, and finds the matrices of a base that it changes.

Only plain LoRA of linear layers is taken: `weight + scale * (B @ A)`, where `scale` is `lora_alpha / r`, or
`lora_alpha / sqrt(r)` with `use_rslora`. Source: peft 0.21.2, tuners/lora/layer.py (`update_layer`, `get_delta_weight`)
and utils/other.py (`get_pattern_key`). Everything else that an adapter can say is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.completeness.names import without_leading
from requant.tasks.checkpoint.fp8 import is_fp8
from requant.tasks.checkpoint.header import Tensor, read_header, size_of
from requant.tasks.checkpoint.untrusted import MAX_SMALL_JSON_BYTES, parse, shown
from requant.tasks.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# Fields of peft's LoraConfig that do not change what is merged: about training, or read below.
NO_MATTER = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
}  # fmt: skip
# Ways to begin a training that leave the base's weights as they are. Others, such as pissa, change them first.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
# Their matrices are stored transposed, in the module Conv1D: transformers 5.23.0.
OF_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
DTYPES = {"BF16", "F16", "F32"}
LORA_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
MAX_PATTERNS = 4096
PATTERN_TIMEOUT_S = 0.1
BY_HAND = "merge it with peft (merge_and_unload), save the model, and name its folder as the base"


class AdapterConfig(BaseModel):
    """The fields of `adapter_config.json` that say what is merged."""

    model_config = ConfigDict(extra="allow")

    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, allow_inf_nan=False)
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default={}, max_length=MAX_PATTERNS)
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default={}, max_length=MAX_PATTERNS)
    bias: str = "none"
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, module), self.r)

    def scale_of(self, module: str) -> float:
        """Return the factor of a module's product B @ A."""
        rank, alpha = (
            self.rank_of(module),
            self.alpha_pattern.get(_pattern_of(self.alpha_pattern, module), self.lora_alpha),
        )
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _pattern_of(patterns: Iterable[str], module: str) -> str:
    """Return the first pattern that matches the end of a module's name, as peft's `get_pattern_key`."""
    for pattern in patterns:
        try:
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=PATTERN_TIMEOUT_S):
                return pattern
        except (regex.error, TimeoutError) as error:
            raise CheckpointError(
                f"the pattern {shown(pattern)!r} in the adapter's {CONFIG} cannot be matched ({error}): {BY_HAND}"
            ) from error
    return module


@dataclass(frozen=True)
class Update:
    """A matrix of a base, and what an adapter adds to it: `scale * (b @ a)`.

    Shapes: weight [rows, columns], a [rank, columns], b [rows, rank].
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its config, and its tensors by name."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read config and header of an adapter's folder. Raises CheckpointError for what is not plain LoRA."""
        if size_of(folder / CONFIG) > MAX_SMALL_JSON_BYTES:
            raise CheckpointError(f"the adapter's {CONFIG} is larger than {MAX_SMALL_JSON_BYTES:,} bytes: restore it")
        try:
            document, _ = parse((folder / CONFIG).read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the adapter's {CONFIG} cannot be read ({error}): restore it") from error
        return cls(_config_of(document), read_header(folder / WEIGHTS))

    def updates(self, base: Checkpoint) -> dict[str, Update]:
        """Return what is added to which tensors of a base, by their names.

        Raises CheckpointError if the adapter names or sizes something that the base does not have, or if the base
        stores its weights in another way than the adapter was made for.
        """
        if is_fp8(base.tensors.values()):
            raise CheckpointError(
                "the base is FP8, into which no adapter is merged: name the base in BF16 that the adapter was made for"
            )
        if (kind := base.config.string("model_type")) in OF_CONV1D:
            raise CheckpointError(f"the base is a {kind}, which stores its matrices transposed: {BY_HAND}")
        pairs: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            match = LORA_NAME.fullmatch(name)
            if match is None:
                raise CheckpointError(f"the adapter's {shown(name)} is no LoRA matrix of a linear layer: {BY_HAND}")
            pairs.setdefault(match["module"], {})[match["part"]] = tensor
        if not pairs:
            raise CheckpointError(f"the adapter's {WEIGHTS} has no tensors: restore it")
        places, found = _Places(base), dict[str, Update]()
        for module, parts in pairs.items():
            update = self._update(module, parts, places.find(module))
            if update.weight.name in found:
                raise CheckpointError(f"the adapter has {shown(update.weight.name)} of the base twice: restore it")
            found[update.weight.name] = update
        return found

    def _update(self, module: str, parts: Mapping[str, Tensor], weight: Tensor) -> Update:
        if len(parts) < 2:
            raise CheckpointError(f"the adapter has one of the two matrices of {shown(module)} alone: restore it")
        a, b, rank = parts["A"], parts["B"], self.config.rank_of(module)
        if weight.dtype not in DTYPES or not {a.dtype, b.dtype} <= DTYPES:
            raise CheckpointError(
                f"{shown(module)} is {weight.dtype} in the base, and {a.dtype} and {b.dtype} in the adapter: only "
                f"{', '.join(sorted(DTYPES))} can be merged"
            )
        if len(weight.shape) != 2 or a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
            raise CheckpointError(
                f"{shown(module)} is {list(weight.shape)} in the base, and {list(a.shape)} and {list(b.shape)} with "
                f"rank {rank} in the adapter: it was made for another base"
            )
        return Update(weight, a, b, self.config.scale_of(module))


def _config_of(document: Any) -> AdapterConfig:
    """Check the config of an adapter. Raises CheckpointError."""
    if not isinstance(document, dict):
        raise CheckpointError(f"the adapter's {CONFIG} is not a JSON object: restore it")
    if (kind := document.get("peft_type")) != "LORA":
        raise CheckpointError(
            f"the adapter is of peft's type {shown(str(kind))}, and only LORA can be merged: {BY_HAND}"
        )
    try:
        config = AdapterConfig.model_validate(document)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = shown(".".join(map(str, problem["loc"])))
        raise CheckpointError(f"{place} in the adapter's {CONFIG} is wrong ({problem['msg']}): restore it") from error
    used = {key: value for key, value in (config.model_extra or {}).items() if value and key not in NO_MATTER}
    if config.bias != "none":
        used["bias"] = config.bias
    if config.fan_in_fan_out:
        used["fan_in_fan_out"] = True
    if config.init_lora_weights not in PLAIN_BEGINNINGS:
        used["init_lora_weights"] = config.init_lora_weights
    for key, value in used.items():
        raise CheckpointError(
            f"the adapter is not plain LoRA, but has {shown(key)}: {shown(str(value))}, which Requant does not merge: "
            f"{BY_HAND}"
        )
    return config


class _Places:
    """Finds the tensors of a base by the names of modules, which transformers may begin otherwise than the files."""

    def __init__(self, base: Checkpoint) -> None:
        self._base, self._short = base, dict[str, list[Tensor]]()
        for tensor in base.tensors.values():
            self._short.setdefault(without_leading(tensor.name), []).append(tensor)

    def find(self, module: str) -> Tensor:
        """Return the weight of a module. Raises CheckpointError if there is none, or if it is not known which."""
        name = f"{module}.weight"
        exact = self._base.tensors.get(name)
        found = [exact] if exact is not None else self._short.get(without_leading(name), [])
        if len(found) != 1:
            why = "has several of that name" if found else "does not have"
            raise CheckpointError(
                f"the adapter changes {shown(module)}, which the base {why}: name the base that it was made for, or "
                f"{BY_HAND}"
            )
        tied = (self._base.config, self._base.text_config)
        if module.endswith("lm_head") and any(config.get("tie_word_embeddings") is True for config in tied):
            raise CheckpointError(
                f"the adapter changes {shown(module)}, which the base shares with its embedding: {BY_HAND}"
            )
        return found[0]


def shards_to_change(base: Checkpoint, updates: Iterable[Update]) -> dict[str, list[Tensor]]:
    """Return the shards of a base that hold the matrices of these updates, by path, each with all its tensors."""
    paths = sorted({update.weight.path for update in updates})
    return {path.relative_to(base.folder).as_posix(): [*read_header(path).values()] for path in paths}
