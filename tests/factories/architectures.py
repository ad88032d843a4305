"""Pico models of any architecture of transformers, as `save_pretrained` writes them, and their headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.header import Tensor

# Other sizes than `infra.dev.architectures` builds its models with.
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40,
    "num_hidden_layers": 6, "depth": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "num_heads": 4, "vocab_size": 160, "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6,
    "moe_num_experts": 6, "num_experts_per_tok": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 10,
    "out_hidden_size": 64, "first_k_dense_replace": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Of classes that refuse some of these.
OWN_SIZES = {"Glm5NextForConditionalGeneration": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}}
Shapes = dict[str, tuple[int, ...]]


def pico_config(name: str, **changes: Any) -> Any:
    """The config of a class with small sizes, and with `changes` in the language model's part."""
    import transformers

    config_class = getattr(transformers, name).config_class
    document = config_class().to_dict()
    for part, part_class in config_class.sub_configs.items():
        if document.get(part, False) is None and part_class is not transformers.AutoConfig:
            document[part] = part_class().to_dict()
    _shrink(document)
    for part in (document, document.get("text_config") or {}):
        part.update({key: value for key, value in (OWN_SIZES.get(name, {}) | changes).items() if key in part})
    config = config_class(**document)
    config.architectures = [name]
    return config


def _shrink(document: dict[str, Any]) -> None:
    layers = {document.get(key) for key in ("num_hidden_layers", "depth")}
    for key, value in list(document.items()):
        if isinstance(value, dict) and key.endswith("config") and key != "per_layer_config":
            _shrink(value)
        elif (isinstance(value, list) and len(value) in layers) or key in ("per_layer_config", "transformers_version"):
            del document[key]
        elif key in SIZES and type(value) is int:
            document[key] = SIZES[key]


def pico_shapes(config: Any) -> Shapes:
    """The names and shapes that `save_pretrained` would write for a model with this config."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])._from_config(config)
    tensors = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    return {n: tuple(t.shape) for n, t in revert_weight_conversion(model, tensors).items()}


def stated(config: Any) -> dict[str, Any]:
    """What `config.json` says, with every value, as older versions of transformers wrote it."""
    document: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return document


def headers_only(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Checkpoint:
    """A checkpoint of these tensors without any file."""
    tensors = {name: Tensor(name, dtype, shape, Path("x"), 0, 0) for name, shape in shapes.items()}
    return Checkpoint(Path("x"), ModelConfig(config), tensors, ("x",), None)
