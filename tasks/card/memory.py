"""How much memory a model takes while it serves one sequence: its weights and its cache.

Sources: vLLM 0.32.0, v1/kv_cache_interface.py (what a layer keeps of each token: keys and values, or with multi-head
latent attention one compressed vector) and model_executor/layers/mamba/mamba_utils.py (gated_delta_net_state_shape:
what a linear-attention layer keeps, however long the text is).
"""

from __future__ import annotations

from requant.tasks.checkpoint.config import JsonObject, ModelConfig

CONTEXTS = (8_192, 32_768)  # tokens, for which the card gives figures
CACHE_VALUE_BYTES = 2  # of a key or value in BF16 or FP16, an engine's default
STATE_VALUE_BYTES = 4  # of a recurrent state: mamba_ssm_dtype is float32 in the configs of Qwen
# Keys of configs whose layers differ in ways that are not worked out here.
NOT_WORKED_OUT = ("global_head_dim", "num_global_key_value_heads", "layers_block_type", "hybrid_override_pattern")


def cache_bytes(config: ModelConfig, tokens: int) -> int | None:
    """Return the bytes of the cache of one sequence of `tokens` tokens.

    None if the config does not say, has layers of a kind that is not known here, or takes shorter texts only. A layer
    with a sliding window keeps the tokens of its window. Where a config does not say which layers have one, all count
    as if they kept every token, as in an engine without support for windows.
    """
    text = config.text
    layers, longest = text.integer("num_hidden_layers"), text.integer("max_position_embeddings")
    if layers is None or (longest is not None and longest < tokens) or any(text.get(key) for key in NOT_WORKED_OUT):
        return None
    kinds = text.get("layer_types")
    if not isinstance(kinds, list):
        kinds = ["full_attention"] * layers
    if len(kinds) != layers:
        return None
    sizes = [_layer_bytes(text, kind, tokens) for kind in kinds]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == layers else None


def _layer_bytes(text: JsonObject, kind: object, tokens: int) -> int | None:
    """Return what one layer keeps of a sequence; None if that is not known."""
    if kind == "linear_attention":
        return _state_bytes(text)
    token_bytes = _token_bytes(text)
    if token_bytes is None:
        return None
    if kind == "full_attention":
        return tokens * token_bytes
    window = text.integer("sliding_window" if kind == "sliding_attention" else "attention_chunk_size")
    if kind in ("sliding_attention", "chunked_attention") and window is not None:
        return min(tokens, window) * token_bytes
    return None


def _token_bytes(text: JsonObject) -> int | None:
    """Return what a layer with attention keeps of one token."""
    latent, rope = text.integer("kv_lora_rank"), text.integer("qk_rope_head_dim")
    if latent is not None and rope is not None:
        return (latent + rope) * CACHE_VALUE_BYTES
    heads, hidden = text.integer("num_attention_heads"), text.integer("hidden_size")
    pairs = text.integer("num_key_value_heads") or heads
    width = text.integer("head_dim") or (hidden // heads if hidden and heads else None)
    return 2 * pairs * width * CACHE_VALUE_BYTES if pairs and width else None


def _state_bytes(text: JsonObject) -> int | None:
    """Return what a gated DeltaNet keeps of a sequence: the last inputs of its convolution, and its state."""
    key_heads, value_heads = text.integer("linear_num_key_heads"), text.integer("linear_num_value_heads")
    key_width, value_width = text.integer("linear_key_head_dim"), text.integer("linear_value_head_dim")
    kernel = text.integer("linear_conv_kernel_dim")
    if not (key_heads and value_heads and key_width and value_width and kernel):
        return None
    channels = 2 * key_heads * key_width + value_heads * value_width
    return (kernel - 1) * channels * CACHE_VALUE_BYTES + value_heads * key_width * value_width * STATE_VALUE_BYTES
