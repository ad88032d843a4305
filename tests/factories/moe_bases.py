"""Bases with experts, made of others without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from requant.tasks.checkpoint.checkpoint import INDEX
from tests.factories.checkpoints import (
    all_tensors,
    experts_apart,
    from_bf16,
    raw_tensors,
    safetensors_bytes,
    to_bf16,
    write_checkpoint,
)
from tests.factories.paths import TINY


def trained_moe(folder: Path, experts: int = 4) -> Path:
    """The tiny model as a Qwen3.5-MoE that computes the same: experts fused, in the head too, with 256 of each MLP's
    neurons, each in an order of its own; the others in the shared expert, whose gate is always half open."""
    shutil.copytree(TINY, folder)
    random = np.random.default_rng(0)
    tensors = all_tensors(TINY)
    made: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

    def put(name: str, values: Any) -> None:
        made[name] = ("BF16", values.shape, to_bf16(values))

    for name in sorted(name for name in tensors if name.endswith(".mlp.down_proj.weight")):
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
