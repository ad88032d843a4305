"""Tiny bases of other architectures, with random weights, made by transformers, and the quantize stage run on a base.

The tokenizer is the tiny model's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from requant.tasks.artifact import Manifest, file_of
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.quantize import quantize
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store, open_store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import find_text
from tests.factories.paths import TINY

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


def prepared(folder: Path, base: Path, **settings: Any) -> tuple[Store, Recipe, Manifest, Calibration]:
    """What the quantize stage needs to quantize a base, with a store of its own: `quantize(*prepared(...))`."""
    store = open_store((folder / "store").as_uri())
    files = [file_of(base, path.name) for path in sorted(base.iterdir())]
    for file in files:
        copy = shutil.copyfile(base / file.path, folder / "copy")
        store.put_blob(Path(copy), file)
    small = {"iters": 4, "nsamples": 8, "seqlen": 64, "batch_size": 4, "group_size": 32, **settings}
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "mtp": "drop", "quantize": small})
    return store, recipe, Manifest.of(files), Calibration.of(find_text("builtin:python"))


def quantized(folder: Path, base: Path, **settings: Any) -> tuple[StageResult, Path]:
    """Run the stage on a base; the result, and the checked-out artifact."""
    store, *rest = prepared(folder, base, **settings)
    result = quantize(store, *rest)
    return result, store.checkout(result.manifest, folder / "checkout")
