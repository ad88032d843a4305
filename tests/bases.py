"""Tiny bases of other architectures, with random weights, made by transformers, and the quantize stage run on a base.

The tokenizer is the tiny model's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tasks.artifact import Manifest, file_of
from tasks.checkpoint.checkpoint import INDEX
from tasks.quantize import quantize
from tasks.recipe import Recipe
from tasks.recipe_file import parse_recipe
from tasks.stage import StageResult
from tasks.store import Store, open_store
from tasks.text import Text, find_text
from tests.pico import TINY
from tests.unit.making import (
    all_tensors,
    experts_apart,
    from_bf16,
    raw_tensors,
    safetensors_bytes,
    to_bf16,
    write_checkpoint,
)

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2048, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
           "shared_expert_intermediate_size": 64}  # fmt: skip


def other_base(folder: Path, kind: str, *, fused: bool = False, **changes: Any) -> Path:
    """A base of `kind`: llama, qwen3, qwen3_5_text (hybrid, text only) or qwen3_5_moe_text (with experts); `changes` to
    its config. `fused`: its experts lie in 3-D tensors, as transformers has them in memory."""
    import torch
    import transformers

    values = dict(COMMON)
    if kind.startswith("qwen3_5"):
        text = json.loads((TINY / "config.json").read_text())["text_config"]
        kept = ("layer_types", "rope_parameters", "linear_conv_kernel_dim", "partial_rotary_factor", "attn_output_gate")
        values |= {name: text[name] for name in kept}
        values |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
        values |= {"linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
        values["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 1, 1]}
    if "moe" in kind:
        values |= EXPERTS
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **values | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, save_original_format=not fused)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def trained_moe(folder: Path, experts: int = 4) -> Path:
    """The tiny model as a Qwen3.5-MoE that computes the same: experts fused, in the head too, with 256 of each MLP's
    neurons, each in an order of its own; the others in the shared expert, whose gate is always half open."""
    shutil.copytree(TINY, folder)
    random = np.random.default_rng(0)
    tensors = all_tensors(TINY)
    made: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

    def put(name: str, values: Any) -> None:
        made[name] = ("BF16", values.shape, to_bf16(values))

    for name in [name for name in tensors if name.endswith(".mlp.down_proj.weight")]:
        mlp = name.removesuffix(".down_proj.weight")
        dense = {p: tensors.pop(f"{mlp}.{p}_proj.weight") for p in ("gate", "up", "down")}
        gate, up, down = (from_bf16(data, shape) for _, shape, data in dense.values())
        orders = [random.permutation(256) for _ in range(experts)]
        put(f"{mlp}.experts.gate_up_proj", np.stack([np.concatenate([gate[o], up[o]]) for o in orders]))
        put(f"{mlp}.experts.down_proj", np.stack([down[:, o] for o in orders]))
        put(f"{mlp}.gate.weight", random.normal(0, 0.1, (experts, gate.shape[1])).astype(np.float32))
        put(f"{mlp}.shared_expert_gate.weight", np.zeros((1, gate.shape[1]), np.float32))
        shared = {"gate": gate[256:], "up": up[256:], "down": 2 * down[:, 256:]}
        for part, values in shared.items():
            put(f"{mlp}.shared_expert.{part}_proj.weight", values)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    made |= tensors
    config = json.loads((TINY / "config.json").read_text())
    config |= {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    config["vision_config"]["model_type"] = "qwen3_5_moe_vision"
    config["text_config"] |= {"model_type": "qwen3_5_moe_text", "num_experts": experts, "num_experts_per_tok": 2}
    config["text_config"] |= {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 128}
    return write_checkpoint(folder, {"model-00001-of-00001.safetensors": made}, config)


def with_experts_apart(base: Path, folder: Path) -> Path:
    """The same base with one tensor for each matrix of an expert; its head's stay fused."""
    shutil.copytree(base, folder)
    weight_map: dict[str, str] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = experts_apart(raw_tensors(shard))
        shard.write_bytes(safetensors_bytes(tensors))
        weight_map |= dict.fromkeys(tensors, shard.name)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps({**index, "weight_map": weight_map}, indent=2) + "\n")
    return folder


def prepared(folder: Path, base: Path, **settings: Any) -> tuple[Store, Recipe, Manifest, Text]:
    """What the quantize stage needs to quantize a base, with a store of its own: `quantize(*prepared(...))`."""
    store = open_store((folder / "store").as_uri())
    files = [file_of(base, path.name) for path in sorted(base.iterdir())]
    for file in files:
        copy = shutil.copyfile(base / file.path, folder / "copy")
        store.put_blob(Path(copy), file)
    small = {"iters": 4, "nsamples": 8, "seqlen": 64, "batch_size": 4, "group_size": 32, **settings}
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "mtp": "drop", "quantize": small})
    return store, recipe, Manifest.of(files), find_text("builtin:python")


def quantized(folder: Path, base: Path, **settings: Any) -> tuple[StageResult, Path]:
    """Run the stage on a base; the result, and the checked-out artifact."""
    store, *rest = prepared(folder, base, **settings)
    result = quantize(store, *rest)
    return result, store.checkout(result.manifest, folder / "checkout")
