"""The dtype in which an engine serves a checkpoint, and what it makes of scales that are stored in another one.

vLLM and SGLang keep the scales of integer weights in the dtype of the model. So the float16 scales of a bfloat16 model
are rounded to bfloat16 when they are loaded, which changes each by at most 0.4 %, and the weights are computed from
them. Validation does the same, so that what is judged is what is served.

Sources: vLLM 0.32.0, config/model.py (`_get_and_verify_dtype`), transformers_utils/model_arch_config_convertor.py
(`get_torch_dtype`), and `params_dtype` of the scales in model_executor/layers/quantization/auto_gptq.py, auto_awq.py
and compressed_tensors/schemes/compressed_tensors_wNa16.py; SGLang 0.5.23, srt/layers/quantization/gptq/gptq.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.modules import split_name

Dtype = Literal["bfloat16", "float16"]
# What vLLM serves instead of the words of configs and of its flag. Kernels for integer weights have no float32.
SERVED: Mapping[str, Dtype] = {
    "bfloat16": "bfloat16", "float16": "float16", "half": "float16", "float32": "bfloat16", "float": "bfloat16",
}  # fmt: skip
# Model types that vLLM never serves in float16, as "numerically unstable" (_FLOAT16_NOT_SUPPORTED_MODELS).
NEVER_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
STORED = {"bfloat16": "BF16", "float16": "F16"}  # the same in the headers of safetensors
PARTS_WITH_DTYPE = ("text_config", "vision_config")  # of a multimodal config, in the order in which vLLM looks


def dtype_of_config(config: Mapping[str, Any]) -> Dtype | None:
    """Return the dtype in which vLLM serves a checkpoint with this config.json by default; None if it names none."""
    parts = [config, *(part for key in PARTS_WITH_DTYPE if isinstance(part := config.get(key), dict))]
    for word in (part.get("dtype") or part.get("torch_dtype") for part in parts):
        if word:
            dtype = SERVED.get(str(word).removeprefix("torch."))
            return "bfloat16" if dtype == "float16" and config.get("model_type") in NEVER_FLOAT16 else dtype
    return None


def dtype_of_flags(flags: Mapping[str, Any]) -> Dtype | None:
    """Return the dtype that an engine's flags ask for; None if they leave it to the engine."""
    return SERVED.get(str(flags.get("dtype", "")).lower())


def rounded_scales(tensors: Iterable[Tensor], served: Dtype | None) -> Dtype | None:
    """Return the dtype to which an engine rounds the scales among these tensors; None if it keeps them as stored."""
    if served is None:
        return None
    scales = (tensor for tensor in tensors if split_name(tensor.name)[1] == "scales")
    return served if any(tensor.dtype != STORED[served] for tensor in scales) else None
