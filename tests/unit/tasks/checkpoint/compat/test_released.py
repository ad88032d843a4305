"""Models as their makers release them: no engine is said to refuse what it loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from tests.factories.checkpoints import all_tensors, from_bf16, quantization_config, rounded, write_checkpoint
from tests.factories.fp8_bases import as_fp8
from tests.factories.head_families import FAMILIES, HIDDEN, LAYERS, Family

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


@pytest.mark.parametrize(("architecture", "loads"), [("Phi3ForCausalLM", None), ("Glm4MoeForCausalLM", False)])
def test_fused_layers_are_judged_only_where_it_is_known_what_vllm_fuses(
    architecture: str, loads: bool | None, tmp_path: Path
) -> None:
    """Phi-3's checkpoints have qkv_proj, which its class in vLLM fuses of nothing else."""
    made = FAMILIES["unheard-of"]
    written = Family(**{**vars(made), "architecture": architecture, "head": {}, "config": {}}).write(tmp_path / "base")
    tensors = all_tensors(written)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn"
        for part in "qkv":
            tensors.pop(f"{prefix}.{part}_proj.weight")
        tensors[f"{prefix}.qkv_proj.weight"] = ("BF16", (3 * HIDDEN, HIDDEN), b"\x80?" * (3 * HIDDEN * HIDDEN))
    packed = [name.removesuffix(".weight") for name in tensors if ".layers." in name and name.endswith("_proj.weight")]
    for module in packed:
        _, shape, data = tensors.pop(f"{module}.weight")
        tensors |= {f"{module}.{part}": raw for part, raw in rounded(from_bf16(data, shape))[0].items()}
    quantization = quantization_config() | {
        "block_name_to_quantize": "model.layers.9",
        "extra_config": {module: {"bits": 4} for module in packed},
    }
    config = {**json.loads((written / "config.json").read_text()), "quantization_config": quantization}
    (checked := tmp_path / "made").mkdir()
    write_checkpoint(checked, {"model-00001-of-00001.safetensors": tensors}, config)
    verdict = Judgement.of(Checkpoint.open(checked)).verdicts["vllm"]
    assert verdict.loads is loads, verdict.reason
