"""Small checkpoints with MTP heads of every layout, and quantized ones made of them with every packing.

Not models that run: names, shapes and dtypes as in the real ones, random values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from requant.tasks.checkpoint.packing import PackingScheme, pack
from tests.factories.checkpoints import FULL, to_bf16, write_checkpoint

HIDDEN, INTERMEDIATE, EXPERTS, VOCAB, GROUP = 64, 96, 2, 128, 32
LAYOUTS = ("mtp", "mtp-moe", "mtp-moe-split", "inlined", "inlined-moe")
# Packing of a checkpoint to (quant_method, packing_format, checkpoint_format).
PACKINGS = {
    "auto_round:auto_gptq": ("auto-round", "auto_round:auto_gptq", None),
    "auto_round": ("auto-round", "auto_round", None),
    "auto_round:auto_awq": ("auto-round", "auto_round:auto_awq", None),
    "gptq": ("gptq", None, "gptq"),
    "gptq_v2": ("gptq", None, "gptq_v2"),
    "awq": ("awq", None, None),
}
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def make_base(folder: Path, layout: str, *, seed: int = 0, shards: int = 2, layers: int = 1) -> Path:
    """A base with a head of this layout and 2 decoder layers before it."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    split = layout != "mtp-moe"
    for number in range(2):
        shapes |= _layer(f"model.layers.{number}", moe="moe" in layout, split=split)
    for number in range(layers):
        if layout.startswith("mtp"):
            shapes |= _layer(f"mtp.layers.{number}", moe="moe" in layout, split=split)
        else:
            prefix = f"model.layers.{2 + number}"
            shapes |= _layer(prefix, moe="moe" in layout, split=True)
            shapes |= {f"{prefix}.{n}.weight": (HIDDEN,) for n in ("enorm", "hnorm", "shared_head.norm")}
            shapes[f"{prefix}.eh_proj.weight"] = (HIDDEN, 2 * HIDDEN)
    if layout.startswith("mtp"):
        norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        shapes |= {"mtp.fc.weight": (HIDDEN, 2 * HIDDEN)} | {f"mtp.{n}.weight": (HIDDEN,) for n in norms}
    tensors = {name: ("BF16", shape, to_bf16(random.normal(0, 0.05, shape))) for name, shape in shapes.items()}
    count = "mtp_num_hidden_layers" if layout.startswith("mtp") else "num_nextn_predict_layers"
    config = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": 2, count: layers, "dtype": "bfloat16"}
    # Engines choose the draft model by the architecture. Of a made-up model type nothing else is known.
    architecture = "Qwen3NextForCausalLM" if layout.startswith("mtp") else "Glm4MoeForCausalLM"
    config |= {"model_type": "made_up", "architectures": [architecture]}
    write_checkpoint(folder, sharded(tensors, shards), config)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    return folder


def sharded(tensors: Tensors, count: int) -> dict[str, Tensors]:
    groups = np.array_split(np.array(list(tensors), dtype=object), count)
    names = (f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    return {shard: {name: tensors[name] for name in group} for shard, group in zip(names, groups, strict=True)}


def quantized(
    tensors: Tensors, folder: Path, config: dict[str, Any], packing: str, *, head: list[str], shards: int, single: bool
) -> Path:
    """What a quantizer makes of a base's tensors: the main model's matrices packed, and the `head` modules too."""
    method, packing_format, checkpoint_format = PACKINGS[packing]
    quantization: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": GROUP, "sym": True}
    quantization |= {"packing_format": packing_format} if packing_format else {}
    quantization |= {"checkpoint_format": checkpoint_format, "desc_act": False} if checkpoint_format else {}
    quantization |= {"zero_point": True, "version": "gemm"} if method == "awq" else {}
    fused = any(len(raw[1]) == 3 for raw in tensors.values())  # stay as they are
    quantization |= {"extra_config": {r".*mlp\.experts.*": FULL}} if fused and method == "auto-round" else {}
    quantization |= {"dynamic": {r"-:.*mlp\.experts.*": {}}} if fused and method == "gptq" else {}
    main = [n.removesuffix(".weight") for n in tensors if n.startswith(("model.layers.0.", "model.layers.1."))]
    modules = {m for m in main if m.endswith("_proj") and f"{m}.weight" in tensors} | set(head)
    result: Tensors = {}
    for name, raw in tensors.items():
        module = name.removesuffix(".weight")
        result |= packed(module, raw, packing) if module in modules else {name: raw}
    layout = {"model.safetensors": result} if single else sharded(result, shards)
    write_checkpoint(folder, layout, {**config, "quantization_config": quantization}, index=not single)
    if method == "auto-round":
        (folder / "quantization_config.json").write_text(json.dumps(quantization))
    return folder


def packed(module: str, raw: tuple[str, tuple[int, ...], bytes], packing: str) -> Tensors:
    values = values_of(raw)
    parts = pack([values], values.shape, scheme_of(packing))
    dtypes = {"qweight": "I32", "qzeros": "I32", "scales": "F16"}
    return {f"{module}.{p}": (dtypes[p], tuple(v.shape), v.tobytes()) for p, v in parts.items()}


def scheme_of(packing: str) -> PackingScheme:
    kind = {"auto_round:auto_gptq": "gptq", "gptq": "gptq", "auto_round:auto_awq": "awq", "awq": "awq"}
    return PackingScheme(4, GROUP, kind.get(packing, "gptq_v2"))


def values_of(raw: tuple[str, tuple[int, ...], bytes]) -> Any:
    return (np.frombuffer(raw[2], "<u2").astype(np.uint32) << 16).view(np.float32).reshape(raw[1])


def head_modules(base: Tensors, layout: str) -> list[str]:
    """The head's matrices that a careless quantizer packs."""
    prefix = "mtp." if layout.startswith("mtp") else "model.layers.2."
    matrices = [n.removesuffix(".weight") for n, raw in base.items() if n.startswith(prefix) and len(raw[1]) == 2]
    return [m for m in matrices if m.endswith(("_proj", ".fc"))]


def _layer(prefix: str, *, moe: bool, split: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in ("q", "k", "v", "o")
    }
    shapes |= {f"{prefix}.{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")}
    if not moe:
        return shapes | _mlp(f"{prefix}.mlp")
    shapes |= {f"{prefix}.mlp.gate.weight": (EXPERTS, HIDDEN), f"{prefix}.mlp.shared_expert_gate.weight": (1, HIDDEN)}
    shapes |= _mlp(f"{prefix}.mlp.shared_expert")
    if split:
        return shapes | {k: v for e in range(EXPERTS) for k, v in _mlp(f"{prefix}.mlp.experts.{e}").items()}
    experts = f"{prefix}.mlp.experts"
    shapes[f"{experts}.gate_up_proj"] = (EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    return shapes | {f"{experts}.down_proj": (EXPERTS, HIDDEN, INTERMEDIATE)}


def _mlp(prefix: str) -> dict[str, tuple[int, ...]]:
    wide = {f"{prefix}.{n}_proj.weight": (INTERMEDIATE, HIDDEN) for n in ("gate", "up")}
    return {**wide, f"{prefix}.down_proj.weight": (HIDDEN, INTERMEDIATE)}
