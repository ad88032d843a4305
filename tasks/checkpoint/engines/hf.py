"""transformers: what it loads. It has no speculative decoding from an MTP head: the tensors are ignored.

Source: transformers 5.23.0, quantizers/auto.py (AUTO_QUANTIZER_MAPPING), models/qwen3_5/modeling_qwen3_5.py
(`_keys_to_ignore_on_load_unexpected = [r"^mtp.*"]`), models/deepseek_v3 and models/glm4_moe (layers beyond
`num_hidden_layers` likewise).
"""

from __future__ import annotations

from tasks.checkpoint.checkpoint import Checkpoint
from tasks.checkpoint.engines.rule import Refused, shorten
from tasks.checkpoint.engines.vllm import quantization_of

METHODS = {
    "awq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "aqlm", "quanto", "quark", "fouroversix",
    "fp_quant", "eetq", "higgs", "hqq", "compressed-tensors", "fbgemm_fp8", "torchao", "bitnet", "vptq", "spqr", "fp8",
    "gguf", "nvfp4", "mxfp8", "auto-round", "mxfp4", "metal", "sinq", "gemma",
}  # fmt: skip
IGNORED = "transformers ignores the MTP head"


def load_problem(checkpoint: Checkpoint) -> str | None:
    """Why transformers would not load it, or None."""
    try:
        quantization = quantization_of(checkpoint.config)
    except Refused as refusal:
        return f"transformers refuses quantization_config: {refusal}"
    packed = next((module for module in checkpoint.modules.values() if module.quantized), None)
    if quantization is None:
        if packed is not None:
            return f"{packed.tensor.name} is quantized, and config.json has no quantization_config: restore it"
        return None
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        return f"quant_method is {shorten(method)}, which transformers does not know"
    return None
