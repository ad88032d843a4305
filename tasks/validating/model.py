"""Checkpoints as transformers models.

Packed weights are dequantized by their documented formula and not by an engine's kernels. So the measured values depend
on the files alone, on any machine that can hold the model.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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

from requant.startup import collect_garbage_often
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.dequantize import plain_tensor, weight_of
from requant.tasks.checkpoint.fp8 import dequantized_tensors
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import PLAIN_PARTS, modules_of
from requant.tasks.checkpoint.served_dtype import STORED, Dtype, dtype_of_config
from requant.tasks.checkpoint.stored_matrix import is_plain_fp8, stored_matrix
from requant.tasks.errors import CheckpointError, TokenizerError
from requant.tasks.settings import read_settings

CORRECTION_BIAS = "e_score_correction_bias"
READERS = 4  # threads that read tensors for a GPU: one alone is slower than the memory that the files are in
FEW_THREADS_BYTES = 128 << 20  # weights below this size are computed with by one thread
transformers.logging.set_verbosity_error()  # otherwise it warns of every kernel that is not installed
transformers.logging.disable_progress_bar()
collect_garbage_often()  # Every module that computes with tensors in this process imports this one.


@dataclass(frozen=True)
class RunSettings:
    """The device, dtype and permission for remote code with which a checkpoint is run.

    `served` is the dtype that the recipe's flags ask the engine for. The scales of packed weights are rounded as an
    engine rounds them that serves the checkpoint in this dtype, or by default in that of its config.
    `tokens_of` is the folder of another checkpoint, whose tokenizer makes the tokens.
    """

    device: torch.device
    dtype: torch.dtype
    remote_code: bool = False  # whether Python code of the checkpoint may be run
    served: Dtype | None = None
    tokens_of: Path | None = None

    def served_dtype(self, config: ModelConfig) -> Dtype | None:
        """Return the dtype in which a checkpoint with this config is served; None if nobody says."""
        return self.served or dtype_of_config(config)


def pick_device(parameters: int = 0) -> torch.device:
    """Choose the GPU if it has room for that many parameters in bfloat16, otherwise the CPU."""
    gpu = torch.device("cuda")
    return gpu if torch.cuda.is_available() and 2 * parameters < 0.85 * room(gpu) else torch.device("cpu")


def pick_dtype(parameters: int, device: torch.device) -> torch.dtype:
    """Choose bfloat16 on a GPU, and on a CPU float32, which is as fast there, unless it does not fit the memory."""
    fits = 4 * parameters < 0.6 * psutil.virtual_memory().total
    return torch.float32 if device.type == "cpu" and fits else torch.bfloat16


def room(device: torch.device) -> int:
    """Return the bytes that may be allocated on a device: the free memory, or up to REQUANT_GPU_GB of a shared GPU."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        limit = (read_settings().gpu_gb or math.inf) * 1e9
        return int(min(free, limit)) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


@contextlib.contextmanager
def few_threads(nbytes: int) -> Iterator[None]:
    """Use one thread while a model with small weights runs.

    More threads gain little there, and if another process uses the cores, they wait for each other ten times as long as
    they work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if nbytes < FEW_THREADS_BYTES else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_model(checkpoint: Checkpoint, settings: RunSettings) -> Any:
    """Load the complete model of a checkpoint, quantized or not, without its MTP head, in evaluation mode.

    Raises CheckpointError for an architecture that transformers does not know, and for tensors that do not fit it.
    """
    skeleton = Skeleton(checkpoint, settings)
    skeleton.hold()
    return skeleton.model


class Skeleton:
    """A transformers model without weights. Those of the decoder blocks can be loaded and dropped one block at a time.

    The weights outside of the blocks are loaded with `load_ends` (embeddings, final norm, output layer) and `load_rest`
    (a vision tower), and stay. `blocks` are the decoder layers of the text model.
    """

    def __init__(self, checkpoint: Checkpoint, settings: RunSettings) -> None:
        self.checkpoint, self.settings, self.dtype, self.device = checkpoint, settings, settings.dtype, settings.device
        family, config = family_of(checkpoint, settings.remote_code)
        self.model: Any = empty_model(family, config, settings)
        self._paths = {module: name for name, module in self.model.named_modules()}
        self.text: Any = text_model(self.model)
        self.blocks: list[nn.Module] = list(getattr(self.text, "layers", ()))
        if not self.blocks:
            raise CheckpointError(f"{type(self.model).__name__} has no decoder layers that can be told apart")
        self._load_config = loading_of(self.model, settings)
        self._parts = self._tensors_by_part()
        self._resident: set[int | str] = set()  # parts whose weights stay

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """Load a decoder block for as long as the context lasts."""
        block = self.blocks[number]
        if number not in self._resident:
            self._load(number, [block])
        try:
            yield block
        finally:
            if number not in self._resident:
                _empty(block)

    def in_turn(self, *, stay: bool = False) -> Iterator[nn.Module]:
        """Load the decoder blocks one after the other, each until the next one is asked for, or to `stay`.

        On a GPU with room for it, the weights of the next block are read while this one computes.
        """
        ahead: Future[dict[str, torch.Tensor]] | None = None
        with ThreadPoolExecutor(1) as reader:
            for number, block in enumerate(self.blocks):
                if number not in self._resident:
                    self._load(number, [block], ahead)
                ahead = reader.submit(self._read, number + 1) if self._can_be_read_ahead(number + 1) else None
                if stay:
                    self._resident.add(number)
                try:
                    yield block
                finally:
                    if number not in self._resident:
                        _empty(block)

    def load_ends(self) -> None:
        """Load embeddings, final norm and output layer, which stay."""
        ends = (self.text.get_input_embeddings(), getattr(self.text, "norm", None), self.model.get_output_embeddings())
        self._load_to_stay("ends", ends)

    def load_rest(self) -> None:
        """Load the modules that belong neither to the text model nor to its output layer, which stay."""
        self._load_to_stay("rest", [module for _, module in self._other_modules()])

    def hold(self) -> None:
        """Load all weights, which stay."""
        self.load_ends()
        self.load_rest()
        for _ in self.in_turn(stay=True):
            pass

    def drop(self) -> None:
        """Drop all weights, and return their GPU memory to the device. The model cannot run any more."""
        _empty(self.model)
        self._resident.clear()
        free(self.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the output layer on hidden states after the final norm, `[..., hidden]` -> float32 `[..., vocab]`.

        This includes Gemma's soft cap, Granite's division and Cohere's factor.
        """
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden).float()
        config = self.text.config
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits / (getattr(config, "logits_scaling", None) or 1) * (getattr(config, "logit_scale", None) or 1)

    @property
    def nbytes(self) -> int:
        """The bytes of all weights in this precision."""
        return int(sum(p.numel() for p in self.model.parameters())) * self.dtype.itemsize

    @property
    def absent_bytes(self) -> int:
        """The bytes of the weights that are not loaded, in this precision."""
        return int(sum(p.numel() for p in self.model.parameters() if p.is_meta)) * self.dtype.itemsize

    def _other_modules(self) -> list[tuple[str, nn.Module]]:
        """Return paths and modules of a multimodal model other than the text model."""
        if self.text is self.model.model:
            return []
        children = self.model.model.named_children()
        return [(f"model.{name}", module) for name, module in children if module is not self.text]

    def _tensors_by_part(self) -> dict[int | str, list[Tensor]]:
        """Group the checkpoint's tensors by decoder block, `ends` and `rest`, as transformers' names for them say."""
        known, mapping = self.model.state_dict(), self._load_config.weight_mapping or []
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        path = self._paths[self.text]
        siblings = tuple(f"{name}." for name, module in self._other_modules())
        parts: dict[int | str, list[Tensor]] = {"ends": [], "rest": [], **{n: [] for n in range(len(self.blocks))}}
        head = set(self.checkpoint.head.names if self.checkpoint.head else ())
        modules = self.checkpoint.modules
        name_of_part = {t.name: (name, part) for name, m in modules.items() for part, t in m.parts.items()}
        for tensor in self.checkpoint.tensors.values():
            if tensor.name in head:
                continue
            module, part = name_of_part[tensor.name]
            name = f"{module}.weight" if part and part not in PLAIN_PARTS else tensor.name
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

    def _load_to_stay(self, part: int | str, modules: Iterable[nn.Module | None]) -> None:
        if part not in self._resident:
            self._load(part, modules)
            self._resident.add(part)

    def _can_be_read_ahead(self, number: int) -> bool:
        if self.device.type != "cuda" or number in self._resident or number == len(self.blocks):
            return False
        nbytes = sum(p.numel() for p in self.blocks[number].parameters()) * self.dtype.itemsize
        return nbytes < room(self.device) // 8

    def _read(self, part: int | str) -> dict[str, torch.Tensor]:
        return state_dict(self._parts[part], self.checkpoint, self.settings)

    def _load(
        self,
        part: int | str,
        modules: Iterable[nn.Module | None],
        ahead: Future[dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """Load a part, of which `ahead` may be read. Raises CheckpointError if one of these modules lacks a weight."""
        folder = self.checkpoint.folder
        state = self._read(part) if ahead is None else ahead.result()
        fill(self.model, state, self._load_config, str(folder))
        self.model.tie_weights()
        missing = [
            f"{self._paths[module]}.{name}"
            for module in modules
            if module is not None
            for name, parameter in module.named_parameters()
            if parameter.is_meta
        ]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(f"{folder} lacks {missing[0]}{more}")


def empty_model(family: Any, config: Any, settings: RunSettings) -> Any:
    """Make a transformers model without weights, in evaluation mode. Buffers that are in no checkpoint have values."""
    with init_empty_weights(include_buffers=False):
        model = family._from_config(config, dtype=settings.dtype)
    model.eval()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(settings.device)
    return model


def loading_of(model: Any, settings: RunSettings) -> LoadStateDictConfig:
    """Return how `fill` loads weights into a model: names, experts and dtypes are converted as transformers does it.

    Routers' correction biases are float32 for all models. transformers 5.23.0 does not ask for that in DeepSeek V3;
    vLLM 0.32.0 does (model_executor/models/deepseek_v2.py).
    """
    return LoadStateDictConfig(
        dtype=settings.dtype,
        dtype_plan={**model._get_dtype_plan(settings.dtype), CORRECTION_BIAS: torch.float32},
        device_map={"": settings.device},
        weight_mapping=get_model_conversion_mapping(model),
    )


def fill(model: Any, state: dict[str, torch.Tensor], loading: LoadStateDictConfig, source: str) -> set[str]:
    """Load weights into a model, and return the names of those that `state` lacks. `source` is what the weights are of.

    Raises CheckpointError for weights that do not fit.
    """
    loaded, _ = convert_and_load_state_dict_in_model(model, state, loading)
    for name, *_ in sorted(loaded.mismatched_keys, key=str):
        raise CheckpointError(f"{source} has another shape than its config says of {name}")
    for name in sorted(loaded.conversion_errors):
        raise CheckpointError(f"{source}: transformers cannot convert {name}")
    return set(loaded.missing_keys)


def family_of(checkpoint: Checkpoint, remote_code: bool) -> tuple[Any, Any]:
    """Return transformers' model class for a checkpoint, with a language model head, and its config."""
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=remote_code)
    except (ValueError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"transformers cannot read {checkpoint.folder / 'config.json'}: {reason}") from error
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


def completed_config(config: ModelConfig) -> ModelConfig | None:
    """Complete a config as transformers does to build a model: with all defaults, and old keys under current names.

    Returns None if transformers has no class of its own for the config, or the class refuses it.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        return None
    try:
        return ModelConfig(transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(config)).to_dict())
    except Exception:  # its checks raise anything; the configs are then compared as they are
        return None


def _empty(module: nn.Module) -> None:
    """Drop a module's weights."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def state_dict(tensors: Iterable[Tensor], checkpoint: Checkpoint, settings: RunSettings) -> dict[str, torch.Tensor]:
    """Return tensors of a checkpoint by name, on the device of the settings.

    Quantized modules are weights `[out, in]`, and floating-point tensors have the dtype of the settings. Raises
    CheckpointError for a quantized module that cannot be read.

    Packed integers are dequantized with the scales as an engine keeps them: see `checkpoint/served_dtype.py`. FP8
    is rounded to BF16 first, which is what quantize reads of it. Vectors keep a higher precision that they have, since
    transformers keeps some of them in it, such as the correction bias of a router, whose values differ by less than
    bfloat16 can tell.
    """
    dtype, scale_dtype = settings.dtype, STORED.get(settings.served_dtype(checkpoint.config) or "")
    tensors = list(tensors)
    stored = {name: m for name, m in modules_of(tensors, checkpoint.method).items() if m.quantized}
    stored = {name: m for name, m in stored.items() if not is_plain_fp8(checkpoint, m)}
    part_names = {t.name for module in stored.values() for t in module.quantized_parts.values()}
    plain = dequantized_tensors([t for t in tensors if t.name not in part_names], checkpoint.config)

    def read(tensor: Tensor) -> torch.Tensor:
        value = plain_tensor(tensor, settings.device)
        if not value.is_floating_point():
            return value
        return value.to(torch.promote_types(value.dtype, dtype) if value.dim() == 1 else dtype)

    def dequantize(name: str) -> torch.Tensor:
        matrix = stored_matrix(checkpoint, stored[name], scale_dtype)
        return weight_of(matrix, settings.device, dtype)

    names = [*(tensor.name for tensor in plain), *(f"{name}.weight" for name in stored)]
    with ThreadPoolExecutor(READERS) as pool:
        each = pool.map if settings.device.type == "cuda" else map
        return dict(zip(names, [*each(read, plain), *each(dequantize, stored)], strict=True))


def text_model(model: Any) -> Any:
    """Return the decoder stack of a model. Its output is the hidden states after the final norm."""
    inner = model.model
    return getattr(inner, "language_model", inner)


def free(device: torch.device) -> None:
    """Return the GPU memory of dropped models to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load_tokenizer(folder: Path, *, remote_code: bool = False) -> Any:
    """Load a checkpoint's tokenizer. Raises TokenizerError for one that cannot be loaded."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except MemoryError:
        raise
    except Exception as error:  # a wrong tokenizer.json can raise anything, such as KeyError
        reason = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError | StrictDataclassError):
            reason = f"{type(error).__name__}: {reason}"
        raise TokenizerError(f"the tokenizer in {folder} cannot be loaded ({reason[:1000]})") from error
