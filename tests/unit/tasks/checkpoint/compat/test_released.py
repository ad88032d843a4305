"""Models as their makers release them: no engine is said to refuse what it loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from tests.factories.checkpoints import all_tensors, write_checkpoint
from tests.factories.fp8_bases import as_fp8
from tests.factories.head_families import FAMILIES, HIDDEN, LAYERS

INDEXER = {"wk": (32, HIDDEN), "weights_proj": (32, HIDDEN), "wq_b": (HIDDEN, HIDDEN)}


def with_indexer(family: str, folder: Path) -> Path:
    """A base of DeepSeek's sparse attention: an indexer in each decoder layer, that of the head too."""
    written = FAMILIES[family].write(folder)
    tensors = all_tensors(written)
    for layer in range(LAYERS + 1):
        prefix = f"model.layers.{layer}.self_attn.indexer"
        tensors |= {f"{prefix}.{n}.weight": ("BF16", s, b"\x80?" * (s[0] * s[1])) for n, s in INDEXER.items()}
    config = json.loads((written / "config.json").read_text())
    return write_checkpoint(written, {"model-00001-of-00001.safetensors": tensors}, config)


@pytest.mark.parametrize("family", ["deepseek-v3.2", "glm-5"])
@pytest.mark.parametrize("kept", [("weights_proj",), ("weights_proj", "wk")], ids=["FP8", "BF16"])
def test_the_key_of_an_indexer_is_plain_or_fp8_beside_plain_weights(
    family: str, kept: tuple[str, ...], tmp_path: Path
) -> None:
    base = with_indexer(family, tmp_path / "base")
    judged = Judgement.of(Checkpoint.open(as_fp8(base, tmp_path / "fp8", kept=(*kept, "eh_proj"))))
    assert {engine: judged.loading[engine] for engine in ("vllm", "sglang")} == {"vllm": None, "sglang": None}
    assert {engine: judged.drafting[engine] for engine in ("vllm", "sglang")} == {"vllm": None, "sglang": None}
