"""Tiny bases of DeepSeek and GLM, with an MTP head behind the last decoder layer and random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.factories.bases import other_base
from tests.factories.checkpoints import raw_tensors, to_bf16, write_checkpoint

LAYERS = 2  # the first dense, the second with experts
HEAD = f"model.layers.{LAYERS}"
SHARD = "model-00001-of-00001.safetensors"
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
_LATENT: dict[str, Any] = {  # vLLM's attention for the CPU has kernels for these sizes of latent and rotated part alone
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "q_lora_rank": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_INDEXED = {**_LATENT, "index_topk": 16, "index_head_dim": 128, "index_n_heads": 16}
KINDS: dict[str, dict[str, Any]] = {  # values of model_type
    "deepseek_v3": {**_LATENT, "rope_parameters": _YARN},
    "deepseek_v32": _INDEXED,
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _INDEXED,
}


def inlined_base(folder: Path, kind: str, *, heads: int = 1, blocks: float = 1.0, seed: int = 0) -> Path:
    """A base of one of KINDS, and a head of `heads` layers that drafts what the model would choose.

    Model and head choose a token by the one before alone, but for what their decoder layers add, which `blocks` scales.
    With 0 each draft is accepted, but for that of position 0, where engines hide the token from the head.
    """
    values = {**_EXPERTS, **KINDS[kind], "num_hidden_layers": LAYERS + heads}
    if kind == "glm_moe_dsa":  # the second layer looks at the tokens that the first one has chosen
        values["indexer_types"] = ["full", "shared", *["full"] * heads]
    other_base(folder, kind, **values)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": heads}
    config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # of the real ones; transformers forgets them
    by_layer = ("layer_types", "mlp_layer_types", "indexer_types")
    config |= {key: config[key][:LAYERS] for key in by_layer if key in config}
    random = np.random.default_rng(seed)
    tensors = raw_tensors(folder / "model.safetensors")
    hidden = config["hidden_size"]
    for number in range(LAYERS, LAYERS + heads):
        prefix = f"model.layers.{number}"
        norms = ("enorm", "hnorm", "shared_head.norm")
        tensors |= {f"{prefix}.{norm}.weight": ("BF16", (hidden,), b"") for norm in norms}
        tensors[f"{prefix}.eh_proj.weight"] = ("BF16", (hidden, 2 * hidden), b"")
    made = {name: _random(random, name, shape, blocks) for name, (_, shape, _) in sorted(tensors.items())}
    for number in range(LAYERS, LAYERS + heads):
        prefix = f"model.layers.{number}"
        made[f"{prefix}.enorm.weight"] = "BF16", (hidden,), to_bf16(np.ones(hidden))
        made[f"{prefix}.shared_head.norm.weight"] = made["model.norm.weight"]
        taking_over = np.eye(hidden, 2 * hidden) + blocks * random.normal(0, 0.1, (hidden, 2 * hidden))
        made[f"{prefix}.eh_proj.weight"] = "BF16", (hidden, 2 * hidden), to_bf16(taking_over)
        # As in the real ones. Engines read the main model's.
        made[f"{prefix}.embed_tokens.weight"] = made["model.embed_tokens.weight"]
        made[f"{prefix}.shared_head.head.weight"] = made["lm_head.weight"]
    (folder / "model.safetensors").unlink()
    return write_checkpoint(folder, {SHARD: made}, config)


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...], blocks: float) -> Any:
    if "norm" in name and name.endswith(".weight"):
        values = 1 + random.normal(0, 0.2, shape)
    elif len(shape) == 1:
        values = random.normal(0, 0.1, shape)
    else:
        values = random.normal(0, shape[-1] ** -0.5, shape)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        values *= blocks
    if name == "model.embed_tokens.weight":
        values *= shape[-1] ** 0.5
    if name.endswith("e_score_correction_bias"):
        return "F32", shape, values.astype("<f4").tobytes()
    return "BF16", shape, to_bf16(values)
