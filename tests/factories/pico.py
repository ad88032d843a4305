"""Pico checkpoints: real architectures at the smallest sizes, random weights, made in milliseconds without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.factories.paths import TINY

HIDDEN, INTERMEDIATE, HEAD_DIM, VOCAB = 64, 128, 32, 2048
EXPERT = 96  # intermediate size of one expert


def pico_base(
    folder: Path,
    *,
    layers: int = 2,
    seed: int = 0,
    head: bool = True,
    shards: int = 2,
    intermediate: int = INTERMEDIATE,
    experts: int = 0,
) -> Path:
    """A text-and-vision Qwen3.5 with `layers` decoder layers (the last one full attention) and an MTP head.

    `experts`: a Qwen3.5-MoE with so many in each layer and in the head's, fused as on the Hub, and a shared one.
    The tokenizer and the processor files are the tiny model's. BF16, `shards` shards, index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in TINY.iterdir():
        if path.suffix != ".safetensors" and path.name not in {"config.json", "model.safetensors.index.json"}:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((TINY / "config.json").read_text())
    text = config["text_config"]
    text |= {
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": layers,
        "layer_types": ["linear_attention"] * (layers - 1) + ["full_attention"],
        "linear_key_head_dim": HEAD_DIM,
        "linear_value_head_dim": HEAD_DIM,
        "mtp_num_hidden_layers": int(head),
        "rope_parameters": {**text["rope_parameters"], "mrope_section": [2, 1, 1]},
    }
    if experts:
        config |= {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"]}
        text |= {"model_type": "qwen3_5_moe_text", "num_experts": experts, "num_experts_per_tok": 2}
        text |= {"moe_intermediate_size": EXPERT, "shared_expert_intermediate_size": intermediate}
        config["vision_config"]["model_type"] = "qwen3_5_moe_vision"
    config["vision_config"] |= {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    names = _shapes(layers, intermediate, experts, head)
    random = np.random.default_rng(seed)
    tensors = {name: _bf16(random, name, shape) for name, shape in names.items()}
    groups = np.array_split(np.array(list(tensors), dtype=object), shards)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_bf16({name: tensors[name] for name in group}, folder / shard)
        weight_map |= dict.fromkeys(group, shard)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def save_bf16(tensors: dict[str, Any], path: Path) -> None:
    """Save arrays of BF16 bit patterns (uint16) as BF16 tensors: numpy has no such dtype."""
    save_file(tensors, path, metadata={"format": "pt"})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "U16":
            entry["dtype"] = "BF16"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _bf16(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Any:
    vector = len(shape) == 1
    values = random.normal(0, 0.02 if vector else shape[-1] ** -0.5, shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _shapes(layers: int, intermediate: int, experts: int, head: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.language_model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.language_model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        prefix = f"model.language_model.layers.{layer}"
        shapes |= _attention(prefix) if layer == layers - 1 else _linear_attention(prefix)
        shapes |= _mlp(prefix, intermediate, experts)
    shapes |= _vision()
    if head:
        shapes |= _attention("mtp.layers.0") | _mlp("mtp.layers.0", intermediate, experts)
        shapes |= {"mtp.fc.weight": (HIDDEN, 2 * HIDDEN)}
        shapes |= {f"mtp.{n}.weight": (HIDDEN,) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return shapes


def _mlp(prefix: str, intermediate: int, experts: int) -> dict[str, tuple[int, ...]]:
    mlp = f"{prefix}.mlp.shared_expert" if experts else f"{prefix}.mlp"
    shapes: dict[str, tuple[int, ...]] = {
        f"{mlp}.gate_proj.weight": (intermediate, HIDDEN),
        f"{mlp}.up_proj.weight": (intermediate, HIDDEN),
        f"{mlp}.down_proj.weight": (HIDDEN, intermediate),
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
    }
    if experts:
        shapes |= {f"{prefix}.mlp.gate.weight": (experts, HIDDEN), f"{mlp}_gate.weight": (1, HIDDEN)}
        shapes[f"{prefix}.mlp.experts.gate_up_proj"] = (experts, 2 * EXPERT, HIDDEN)
        shapes[f"{prefix}.mlp.experts.down_proj"] = (experts, HIDDEN, EXPERT)
    return shapes


def _attention(prefix: str) -> dict[str, tuple[int, ...]]:
    attention = f"{prefix}.self_attn"
    return {
        f"{attention}.q_proj.weight": (4 * HEAD_DIM, HIDDEN),
        f"{attention}.k_proj.weight": (2 * HEAD_DIM, HIDDEN),
        f"{attention}.v_proj.weight": (2 * HEAD_DIM, HIDDEN),
        f"{attention}.o_proj.weight": (HIDDEN, 2 * HEAD_DIM),
        f"{attention}.q_norm.weight": (HEAD_DIM,),
        f"{attention}.k_norm.weight": (HEAD_DIM,),
    }


def _linear_attention(prefix: str) -> dict[str, tuple[int, ...]]:
    attention, width = f"{prefix}.linear_attn", 2 * HEAD_DIM
    return {
        f"{attention}.A_log": (2,),
        f"{attention}.dt_bias": (2,),
        f"{attention}.conv1d.weight": (3 * width, 1, 4),
        f"{attention}.in_proj_a.weight": (2, HIDDEN),
        f"{attention}.in_proj_b.weight": (2, HIDDEN),
        f"{attention}.in_proj_qkv.weight": (3 * width, HIDDEN),
        f"{attention}.in_proj_z.weight": (width, HIDDEN),
        f"{attention}.norm.weight": (HEAD_DIM,),
        f"{attention}.out_proj.weight": (HIDDEN, width),
    }


def _vision() -> dict[str, tuple[int, ...]]:
    block = "model.visual.blocks.0"
    wide = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.linear_fc1": (64, 32), "mlp.linear_fc2": (32, 64)}
    shapes: dict[str, tuple[int, ...]] = {f"{block}.{n}.weight": s for n, s in wide.items()}
    shapes |= {f"{block}.{n}.bias": (s[0],) for n, s in wide.items()}
    merger = {"linear_fc1": (128, 128), "linear_fc2": (HIDDEN, 128)}
    shapes |= {f"model.visual.merger.{n}.weight": s for n, s in merger.items()}
    shapes |= {f"model.visual.merger.{n}.bias": (s[0],) for n, s in merger.items()}
    norms = (f"{block}.norm1", f"{block}.norm2", "model.visual.merger.norm")
    shapes |= {f"{norm}.{part}": (32,) for norm in norms for part in ("weight", "bias")}
    shapes |= {"model.visual.patch_embed.proj.weight": (32, 3, 2, 16, 16), "model.visual.patch_embed.proj.bias": (32,)}
    shapes |= {"model.visual.pos_embed.weight": (64, 32)}
    return shapes


def pico_llama(folder: Path, *, seed: int = 0) -> Path:
    """A Llama with one decoder layer and tied embeddings in one file, with the tiny model's tokenizer.

    All checkpoints of tests/corpus/makers are made of it, so its weights must not change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": HEAD_DIM, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": True, "rope_theta": 10000.0, "bos_token_id": None,
        "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
    shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HEAD_DIM, HIDDEN) for name in "kv"}
    shapes |= _mlp(layer, INTERMEDIATE, 0)
    random = np.random.default_rng(seed)
    ones = np.uint16(0x3F80)
    tensors = {
        name: np.full(shape, ones) if len(shape) == 1 else _bf16(random, name, shape) for name, shape in shapes.items()
    }
    save_bf16(tensors, folder / "model.safetensors")
    return folder
