"""The dtype in which an engine serves a checkpoint, and the scales that it rounds to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.served_dtype import dtype_of_config, dtype_of_flags, rounded_scales

CONFIGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "by its name of today": ({"dtype": "bfloat16"}, "bfloat16"),
    "by its former name": ({"torch_dtype": "float16"}, "float16"),
    "with both, the name of today first": ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
    "with torch's prefix": ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
    "of a multimodal model": ({"text_config": {"dtype": "float16"}}, "float16"),
    "at the top before that of the text": ({"dtype": "bfloat16", "text_config": {"dtype": "float16"}}, "bfloat16"),
    "of the vision tower alone": ({"text_config": {}, "vision_config": {"torch_dtype": "float16"}}, "float16"),
    "in a precision that no kernel has": ({"dtype": "float32"}, "bfloat16"),
    "in float16, which vLLM never takes for it": ({"dtype": "float16", "model_type": "gemma3"}, "bfloat16"),
    "in float16, for any other model": ({"dtype": "float16", "model_type": "gemma"}, "float16"),
    "in float16, for a model of no type": ({"dtype": "float16", "model_type": ["glm4"]}, "float16"),
    "in bfloat16, as vLLM takes it": ({"dtype": "bfloat16", "model_type": "glm4"}, "bfloat16"),
    "nowhere": ({}, None),
    "in a word that nobody knows": ({"dtype": "float8"}, None),
    "in no word at all": ({"dtype": ["bfloat16"], "text_config": 7}, None),
}


@pytest.mark.parametrize("said", CONFIGS)
def test_the_dtype_of_a_config_is_read_as_vllm_reads_it(said: str) -> None:
    config, expected = CONFIGS[said]
    assert dtype_of_config(config) == expected


@pytest.mark.parametrize(("flags", "expected"), [
    ({"dtype": "half"}, "float16"), ({"dtype": "BFloat16"}, "bfloat16"), ({"dtype": "auto"}, None), ({}, None),
    ({"dtype": {"a": 1}}, None), ({"kv-cache-dtype": "fp8"}, None),
])  # fmt: skip
def test_a_flag_asks_for_a_dtype_or_leaves_it_to_the_engine(flags: dict[str, Any], expected: str | None) -> None:
    assert dtype_of_flags(flags) == expected


@pytest.mark.parametrize(("stored", "served", "expected"), [
    ("F16", "bfloat16", "bfloat16"), ("F16", "float16", None), ("BF16", "float16", "float16"),
    ("BF16", "bfloat16", None), ("F32", "float16", "float16"), ("F16", None, None),
])  # fmt: skip
def test_scales_are_rounded_if_they_are_stored_in_another_dtype(stored: str, served: Any, expected: str | None) -> None:
    tensors = [Tensor("a.scales", stored, (1, 8), Path("x"), 0, 16), Tensor("b.weight", "F32", (1,), Path("x"), 0, 4)]
    assert rounded_scales(tensors, served) == expected
    assert rounded_scales(tensors[1:], served) is None, "a base has no scales"
