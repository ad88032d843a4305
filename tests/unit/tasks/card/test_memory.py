"""What a model takes of memory, against sums made by hand of known configs."""

from __future__ import annotations

from typing import Any

import pytest

from infra.bench.shapes import base_config
from requant.tasks.card.memory import cache_bytes
from requant.tasks.checkpoint.config import ModelConfig

LLAMA = {  # Llama-3.1-8B: 128 KiB for each token
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "max_position_embeddings": 131072,
}  # fmt: skip
GEMMA = {  # Gemma-3-27B: five of six layers have a window of 1024 tokens
    "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
    "hidden_size": 5376, "sliding_window": 1024, "max_position_embeddings": 131072,
    "layer_types": [("full_attention" if (layer + 1) % 6 == 0 else "sliding_attention") for layer in range(62)],
}  # fmt: skip
DEEPSEEK = {  # DeepSeek-V3: 576 values for each token and layer, whatever the number of heads
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 7168,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "max_position_embeddings": 163840,
}  # fmt: skip
QWEN_STATE = 48 * (3 * (2 * 16 * 128 + 48 * 128) * 2 + 48 * 128 * 128 * 4)  # of 48 linear-attention layers


@pytest.mark.parametrize(
    ("config", "tokens", "size"),
    [
        (LLAMA, 8192, 32 * 2 * 8 * 128 * 2 * 8192),
        (LLAMA, 32768, 4 * 1_073_741_824),
        ({"text_config": GEMMA}, 8192, 2 * 16 * 128 * 2 * (10 * 8192 + 52 * 1024)),
        (GEMMA, 512, 2 * 16 * 128 * 2 * 62 * 512),
        (DEEPSEEK, 8192, 61 * 576 * 2 * 8192),
        (base_config(), 32768, 16 * 2 * 4 * 256 * 2 * 32768 + QWEN_STATE),
    ],
    ids=["llama", "llama at 32 k", "gemma", "a text within the window", "deepseek", "qwen"],
)
def test_the_cache_is_what_the_layers_keep(config: dict[str, Any], tokens: int, size: int) -> None:
    assert cache_bytes(ModelConfig(config), tokens) == size


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": 4096},
        {"layer_types": ["mamba"] * 32},
        {"layer_types": ["full_attention"] * 31},
        {"layer_types": ["sliding_attention"] * 32},
        {"layer_types": ["linear_attention"] * 32},
        {"global_head_dim": 512},
        {"num_hidden_layers": None},
        {"num_attention_heads": None, "num_key_value_heads": [8, 4]},
    ],
)
def test_what_a_config_does_not_say_is_not_guessed(change: dict[str, Any]) -> None:
    assert cache_bytes(ModelConfig(LLAMA | change), 8192) is None
