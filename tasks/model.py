"""Checkpoints as torch models: packed weights are dequantized by their documented formula, not by an engine's kernels.

So what is measured is what the files say, on any machine that can hold the model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import nn

from tasks.checkpoint.assemble import packed_parts
from tasks.checkpoint.checkpoint import Checkpoint
from tasks.checkpoint.header import Tensor
from tasks.checkpoint.packing import Scheme, dequantize
from tasks.errors import CheckpointError

log = logging.getLogger(__name__)
transformers.logging.set_verbosity_error()  # it warns of every kernel that is not installed
transformers.logging.disable_progress_bar()

TORCH = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def pick_device(parameters: int = 0) -> torch.device:
    """The GPU if there is one with room for that many parameters in bfloat16, else the CPU."""
    if torch.cuda.is_available() and 2 * parameters < 0.85 * torch.cuda.mem_get_info()[0]:
        return torch.device("cuda")
    return torch.device("cpu")


def pick_dtype(parameters: int, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where it is as fast, unless only bfloat16 fits this machine's memory."""
    fits = 4 * parameters < 0.6 * psutil.virtual_memory().total
    return torch.float32 if device.type == "cpu" and fits else torch.bfloat16


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, remote_code: bool = False) -> Any:
    """The transformers model of a checkpoint, quantized or not, without its head. Evaluation mode.

    Raises CheckpointError for an architecture that transformers does not know, and for tensors that do not fit it.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=remote_code)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"transformers cannot read {checkpoint.folder / 'config.json'}: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    head = set(checkpoint.head.names if checkpoint.head else ())
    state = state_dict((t for t in checkpoint.tensors.values() if t.name not in head), checkpoint.config, dtype)
    try:
        family = auto._model_mapping[type(config)]
    except KeyError as error:
        name = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
        if not remote_code or name is None:
            raise CheckpointError(f"transformers has no language model for {type(config).__name__}") from error
        family = transformers.dynamic_module_utils.get_class_from_dynamic_module(name, str(checkpoint.folder))
    model, info = family.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused here, by name
    )
    for lacking, what in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape than its config says of")):
        names = sorted(key if isinstance(key, str) else key[0] for key in info[lacking])
        if names:
            raise CheckpointError(f"{checkpoint.folder} {what} {names[0]} (and {len(names) - 1} more)")
    return model.to(device).eval()


def state_dict(tensors: Iterable[Tensor], config: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors by name, packed modules as `[out, in]` weights; floating point ones as `dtype`."""
    tensors = list(tensors)
    packed = packed_parts(tensors)
    taken = {t.name for parts in packed.values() for t in parts.values()}
    state = {t.name: to_torch(t) for t in tensors if t.name not in taken}
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    for module, parts in packed.items():
        scheme = Scheme.of(config.get("quantization_config") or {}, module)
        state[f"{module}.weight"] = torch.from_numpy(dequantize(parts, scheme)).to(dtype)
    return state


def to_torch(tensor: Tensor) -> torch.Tensor:
    if tensor.dtype not in TORCH:
        raise CheckpointError(f"{tensor.name} has dtype {tensor.dtype}, which torch cannot hold")
    raw = torch.frombuffer(bytearray(tensor.read()), dtype=torch.uint8) if tensor.nbytes else torch.empty(0)
    return raw.view(TORCH[tensor.dtype]).reshape(tensor.shape)


def text_model(model: Any) -> Any:
    """The decoder stack of a model: hidden states after its final norm come out of it."""
    inner = model.model
    return getattr(inner, "language_model", inner)


class MtpHead(nn.Module):
    """The first layer of a Qwen3.5/3.6 head: drafts x[t+2] from the main model's hidden[t] and x[t+1].

    `fc(cat[norm_e(embed(x[t+1])), norm_h(hidden[t])])`, one full-attention decoder layer at position t, `mtp.norm`, and
    the main model's lm_head. Source: vLLM 0.32, model_executor/models/qwen3_5_mtp.py. The decoder layer is
    transformers' own, in a text model of one layer.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        head = checkpoint.head
        if head is None or head.layout != "mtp":
            raise CheckpointError(f"the MTP head of {checkpoint.folder} has no layout that can be run here")
        main = text_model(model)
        config = copy.deepcopy(main.config)
        config.num_hidden_layers = 1
        config.layer_types = ["full_attention"]
        config.vocab_size, config.pad_token_id = 1, None
        state = state_dict((checkpoint.tensors[n] for n in head.names), checkpoint.config, dtype)
        state = {name.removeprefix("mtp."): value for name, value in state.items()}
        norm: Callable[..., nn.Module] = type(main.norm)
        hidden = config.hidden_size
        self.norm_embedding = norm(hidden, eps=config.rms_norm_eps)
        self.norm_hidden = norm(hidden, eps=config.rms_norm_eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.norm_embedding.load_state_dict({"weight": state.pop("pre_fc_norm_embedding.weight")})
        self.norm_hidden.load_state_dict({"weight": state.pop("pre_fc_norm_hidden.weight")})
        self.fc.load_state_dict({"weight": state.pop("fc.weight")})
        own = {k: v for k, v in state.items() if not k.startswith("layers.") or k.startswith("layers.0.")}
        own["embed_tokens.weight"] = torch.zeros(1, hidden, dtype=dtype)
        self.layer = type(main).from_pretrained(None, config=config, state_dict=own, dtype=dtype)
        self.main = [model]  # in a list, so that it is not a submodule
        self.to(device=device, dtype=dtype).eval()

    def forward(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """tokens int64 `[batch, n]`, hidden `[batch, n, hidden]` of the main model -> logits `[batch, n - 1, vocab]`.

        Row t drafts token t + 2.
        """
        embedded = text_model(self.main[0]).get_input_embeddings()(tokens[:, 1:])
        mixed = self.fc(torch.cat([self.norm_embedding(embedded), self.norm_hidden(hidden[:, :-1])], dim=-1))
        drafted = self.layer(inputs_embeds=mixed, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.main[0].get_output_embeddings()(drafted)
        return logits


def greedy(model: Any, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """Exactly `new` tokens after `prompt` (int64 `[1, n]`), greedy, never ending early: int64 `[new]`."""
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
    )
    tokens: torch.Tensor = output[0, prompt.shape[1] :]
    return tokens


def free(device: torch.device) -> None:
    """Give back what a dropped model held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load_tokenizer(folder: Path, *, remote_code: bool = False) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({error})") from error
