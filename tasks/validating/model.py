"""Checkpoints as torch models: packed weights are dequantized by their documented formula, not by an engine's kernels.

So what is measured is what the files say, on any machine that can hold the model.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from requant.tasks.checkpoint.assemble import packed_parts
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.fp8 import dequantized_tensors
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import split_name
from requant.tasks.checkpoint.packing import GPTQ_PARTS, PackingScheme, dequantize
from requant.tasks.errors import CheckpointError
from requant.tasks.settings import read_settings

RESIDENT_BYTES = 128 << 20  # bytes
transformers.logging.set_verbosity_error()  # it warns of every kernel that is not installed
transformers.logging.disable_progress_bar()

TORCH = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def pick_device(parameters: int = 0) -> torch.device:
    """The GPU if there is one with room for that many parameters in bfloat16, else the CPU."""
    gpu = torch.device("cuda")
    return gpu if torch.cuda.is_available() and 2 * parameters < 0.85 * room(gpu) else torch.device("cpu")


def pick_dtype(parameters: int, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where it is as fast, unless only bfloat16 fits this machine's memory."""
    fits = 4 * parameters < 0.6 * psutil.virtual_memory().total
    return torch.float32 if device.type == "cpu" and fits else torch.bfloat16


def room(device: torch.device) -> int:
    """Bytes of memory that may be taken on a device: what is free, or REQUANT_GPU_GB of it where a card is shared."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        limit = (read_settings().gpu_gb or math.inf) * 1e9
        return int(min(free, limit)) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


@contextlib.contextmanager
def few_threads(nbytes: int) -> Iterator[None]:
    """One thread for weights of some megabytes: more gain little, and beside another process they wait for each other
    ten times as long as they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if nbytes < RESIDENT_BYTES else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, remote_code: bool = False) -> Any:
    """The whole transformers model of a checkpoint, quantized or not, without its head. Evaluation mode.

    Raises CheckpointError for an architecture that transformers does not know, and for tensors that do not fit it.
    """
    skeleton = Skeleton(checkpoint, dtype, device, remote_code=remote_code)
    skeleton.hold()
    return skeleton.model


class Skeleton:
    """A transformers model without weights, which come and go a decoder block at a time.

    What lies outside of the blocks is loaded with `load_ends` (embeddings, final norm, output layer) and `load_rest` (a
    vision tower) and stays. `blocks` are the decoder layers of the text model.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, remote_code: bool = False
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        family, config = _family(checkpoint, remote_code)
        with init_empty_weights(include_buffers=False):
            self.model: Any = family._from_config(config, dtype=dtype)
        self.model.eval()
        for module in self.model.modules():  # inverse frequencies and the like, which no checkpoint holds
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(device)
        self._paths = {module: name for name, module in self.model.named_modules()}
        self.text: Any = text_model(self.model)
        self.blocks: list[nn.Module] = list(getattr(self.text, "layers", ()))
        if not self.blocks:
            raise CheckpointError(f"{type(self.model).__name__} has no decoder layers that can be told apart")
        self._how = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            device_map={"": device},
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        self._parts = self._tensors_by_part()
        self._kept: set[int | str] = set()  # parts that stay

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """A decoder block with its weights, for as long as the context lasts."""
        block = self.blocks[number]
        if number in self._kept:
            yield block
            return
        self._load(number, [block])
        try:
            yield block
        finally:
            _empty(block)

    def load_ends(self) -> None:
        """Load embeddings, final norm and output layer."""
        ends = (self.text.get_input_embeddings(), getattr(self.text, "norm", None), self.model.get_output_embeddings())
        self._keep("ends", ends)

    def load_rest(self) -> None:
        """Load what belongs neither to the text model nor to its output layer."""
        self._keep("rest", [module for _, module in self._beside()])

    def hold(self) -> None:
        """Load everything, and keep it."""
        self.load_ends()
        self.load_rest()
        for number, block in enumerate(self.blocks):
            self._keep(number, [block])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output layer over hidden states `[..., hidden]` after the final norm: float32 `[..., vocab]`.

        With what transformers' families do to it: Gemma's soft cap, Granite's division and Cohere's factor.
        """
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden).float()
        config = self.text.config
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits / (getattr(config, "logits_scaling", None) or 1) * (getattr(config, "logit_scale", None) or 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in this precision."""
        return int(sum(p.numel() for p in self.model.parameters())) * self.dtype.itemsize

    def _beside(self) -> list[tuple[str, nn.Module]]:
        """What stands beside the text model in a multimodal one: paths and modules."""
        if self.text is self.model.model:
            return []
        children = self.model.model.named_children()
        return [(f"model.{name}", module) for name, module in children if module is not self.text]

    def _tensors_by_part(self) -> dict[int | str, list[Tensor]]:
        """The checkpoint's tensors by decoder block, `ends` and `rest`, by the names that transformers gives them."""
        known, mapping = self.model.state_dict(), self._how.weight_mapping or []
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        path = self._paths[self.text]
        siblings = tuple(f"{name}." for name, module in self._beside())
        parts: dict[int | str, list[Tensor]] = {"ends": [], "rest": [], **{n: [] for n in range(len(self.blocks))}}
        head = set(self.checkpoint.head.names if self.checkpoint.head else ())
        for tensor in self.checkpoint.tensors.values():
            if tensor.name in head:
                continue
            module, part = split_name(tensor.name)
            name = f"{module}.weight" if part in GPTQ_PARTS else tensor.name
            key, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, known)
            if key not in known and name in known:
                key = name
            if match := re.match(rf"{re.escape(path)}\.layers\.(\d+)\.", key):
                if int(match[1]) < len(self.blocks):
                    parts[int(match[1])].append(tensor)
            elif key.startswith(siblings):
                parts["rest"].append(tensor)
            else:
                parts["ends"].append(tensor)
        return parts

    def _keep(self, part: int | str, modules: Iterable[nn.Module | None]) -> None:
        if part not in self._kept:
            self._load(part, modules)
            self._kept.add(part)

    def _load(self, part: int | str, modules: Iterable[nn.Module | None]) -> None:
        """Load a part, after which these modules must be whole."""
        folder = self.checkpoint.folder
        state = state_dict(self._parts[part], self.checkpoint.config, self.dtype)
        found, _ = convert_and_load_state_dict_in_model(self.model, state, self._how)
        self.model.tie_weights()
        for name, *_ in sorted(found.mismatched_keys, key=str):
            raise CheckpointError(f"{folder} has another shape than its config says of {name}")
        for name in sorted(found.conversion_errors):
            raise CheckpointError(f"{folder}: transformers cannot convert {name}")
        missing = [
            f"{self._paths[module]}.{name}"
            for module in modules
            if module is not None
            for name, parameter in module.named_parameters()
            if parameter.is_meta
        ]
        if missing:
            raise CheckpointError(f"{folder} lacks {missing[0]} (and {len(missing) - 1} more)")


def _family(checkpoint: Checkpoint, remote_code: bool) -> tuple[Any, Any]:
    """transformers' class for a checkpoint, with a language model head, and its config."""
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=remote_code)
    except (ValueError, OSError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"transformers cannot read {checkpoint.folder / 'config.json'}: {said}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    try:
        return auto._model_mapping[type(config)], config
    except KeyError as error:
        name = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
        if not remote_code or name is None:
            raise CheckpointError(f"transformers has no language model for {type(config).__name__}") from error
        return transformers.dynamic_module_utils.get_class_from_dynamic_module(name, str(checkpoint.folder)), config


def completed_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """A config as a model is built from it: with every default, and old keys under today's names. None where
    transformers has no class of its own for it, or the class does not take it."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        return None
    try:
        made: dict[str, Any] = transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(config)).to_dict()
    except Exception:  # whatever its checks raise: then the configs are compared as they stand
        return None
    return made


def _empty(module: nn.Module) -> None:
    """Take a module's weights away."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def state_dict(tensors: Iterable[Tensor], config: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors by name, packed and FP8 modules as `[out, in]` weights; floating point ones as `dtype`."""
    tensors = dequantized_tensors(tensors, config)
    packed = packed_parts(tensors)
    taken = {t.name for parts in packed.values() for t in parts.values()}
    state = {t.name: to_torch(t) for t in tensors if t.name not in taken}
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    for module, parts in packed.items():
        scheme = PackingScheme.of(config.get("quantization_config") or {}, module)
        state[f"{module}.weight"] = torch.from_numpy(dequantize(parts, scheme)).to(dtype)
    return state


def to_torch(tensor: Tensor) -> torch.Tensor:
    if tensor.dtype not in TORCH:
        raise CheckpointError(f"{tensor.name} has dtype {tensor.dtype}, which torch cannot hold")
    data, position = bytearray(tensor.nbytes), 0
    for chunk in tensor.chunks():
        data[position : position + len(chunk)] = chunk
        position += len(chunk)
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return raw.view(TORCH[tensor.dtype]).reshape(tensor.shape)


def text_model(model: Any) -> Any:
    """The decoder stack of a model: hidden states after its final norm come out of it."""
    inner = model.model
    return getattr(inner, "language_model", inner)


def free(device: torch.device) -> None:
    """Give back what a dropped model held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load_tokenizer(folder: Path, *, remote_code: bool = False) -> Any:
    """Load a checkpoint's tokenizer. Raises CheckpointError for one that cannot be loaded."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except MemoryError:
        raise
    except Exception as error:  # Of a wrong tokenizer.json it can be any, as KeyError or the tokenizers' own.
        said = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError | StrictDataclassError):
            said = f"{type(error).__name__}: {said}"
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({said[:1000]})") from error
