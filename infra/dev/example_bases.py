"""The bases that `examples/` names, as sparse checkpoints: true configs, headers of the true shapes, and no weights.

The dimensions are those of the models' configs on the Hub.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.bench.shapes import INDEX, TINY, Shape, Spec, index_of, split, write_sparse

MAX_SHARD_BYTES = 4_900_000_000
FP8_BLOCK = 128
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class ExampleBase:
    """A base: its config.json and, for FP8, whether the matrices of its blocks are stored so."""

    repo_id: str
    config: dict[str, Any]
    fp8: bool = False
    gated: bool = False


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
QWEN3_30B_A3B = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
}
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head"],
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
EXAMPLE_BASES = (
    ExampleBase("Qwen/Qwen3-8B", QWEN3_8B),
    ExampleBase("Qwen/Qwen3-8B-FP8", QWEN3_8B | {"quantization_config": FP8}, fp8=True),
    ExampleBase("Qwen/Qwen3-30B-A3B", QWEN3_30B_A3B),
    ExampleBase("meta-llama/Llama-3.1-8B-Instruct", LLAMA_31_8B, gated=True),
)


def write_example_base(base: ExampleBase, folder: Path) -> Path:
    """Write a base as a sparse checkpoint, with the tokenizer of the tiny model."""
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY / name, folder / name)
    (folder / "config.json").write_text(json.dumps(base.config, indent=2))
    shards = split(_tensors(base), MAX_SHARD_BYTES)
    for name, specs in shards.items():
        write_sparse(folder / name, specs, {"format": "pt"}, data=False)
    total = sum(spec.nbytes for specs in shards.values() for spec in specs.values())
    (folder / INDEX).write_text(json.dumps(index_of(shards, {"total_size": total}), indent=2))
    return folder


def _tensors(base: ExampleBase) -> dict[str, Spec]:
    """Return the tensors of a base. Matrices of its blocks are in FP8 with their scales if the base is."""
    tensors: dict[str, Spec] = {}
    for name, shape in _shapes(base.config):
        if base.fp8 and name.endswith("_proj.weight"):
            tensors[name] = Spec("F8_E4M3", shape)
            blocks = tuple(-(-side // FP8_BLOCK) for side in shape)
            tensors[f"{name}_scale_inv"] = Spec("BF16", blocks)
        else:
            tensors[name] = Spec("BF16", shape)
    return tensors


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Yield the parameters of a Llama, Qwen3 or Qwen3-MoE in the order of its shards."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    queries, values = heads * head_dim, config["num_key_value_heads"] * head_dim
    vocabulary = (config["vocab_size"], hidden)
    yield "model.embed_tokens.weight", vocabulary
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (values, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (values, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        if config["model_type"].startswith("qwen3"):
            yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if experts := config.get("num_experts"):
            yield f"{prefix}.mlp.gate.weight", (experts, hidden)
            for expert in range(experts):
                yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        else:
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", vocabulary


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}.up_proj.weight", (intermediate, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, intermediate)
