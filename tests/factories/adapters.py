"""LoRA adapters as peft saves them, written without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from requant.tasks.checkpoint.checkpoint import Checkpoint

PREFIX = "model.language_model.layers.1"  # the layer with full attention of a pico base
MODULES = (f"{PREFIX}.self_attn.q_proj", f"{PREFIX}.mlp.down_proj")
RANK = 4


def lora_config(**changes: Any) -> dict[str, Any]:
    """The fields of `adapter_config.json` that matter, and some that do not."""
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8, "bias": "none"}
    return {**plain, "target_modules": ["q_proj", "down_proj"], "modules_to_save": None, **changes}


def lora_tensors(base: Path, modules: tuple[str, ...] = MODULES, rank: int = RANK, seed: int = 0) -> dict[str, Any]:
    """The two matrices of each module, by the names that peft has for them."""
    random, shapes, tensors = np.random.default_rng(seed), Checkpoint.open(base).tensors, {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"].shape
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = random.normal(0, 0.1, shape).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = values
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, Any], config: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(lora_config() if config is None else config))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# an adapter\n")
    return folder
