"""auto-round run in this process, as the quantize child runs it; and small text models to run it on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from tasks.quantize_child import quantize
from tasks.quantizing.events import Events
from tasks.recipe import Quantize
from tests.pico import TINY

SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "tie_word_embeddings": True},
}


def text_base(folder: Path, kind: str) -> Path:
    """A random model of this type in BF16, as transformers saves it, with the tiny model's tokenizer."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def pack_with_auto_round(base: Path, asked: Quantize, folder: Path) -> dict[str, Any]:
    """What auto-round leaves of a base: the child's result, with the folder that it wrote as `checkpoint`."""
    from tasks.checkpoint.checkpoint import Checkpoint

    head = Checkpoint.open(base).head
    job = {
        **asked.model_dump(exclude={"calibration"}),
        **dict(zip(("bits", "group_size", "sym"), asked.resolved, strict=True)),
        "model": str(base),
        "texts": [str(Path(__file__).parent.parent.parent / "tasks" / "texts" / "python.txt")],
        "head": head.prefixes if head else [],
        "device": "cpu",
        "allow_remote_code": False,
        "gradient_accumulate_steps": 1,
    }
    folders = {"AR_RESUME_DIR": str(folder / "resume"), "AR_WORK_SPACE": str(folder / "offload")}
    with mock.patch.dict(os.environ, folders):
        return quantize(job, folder, Events(folder / "events.jsonl"))
