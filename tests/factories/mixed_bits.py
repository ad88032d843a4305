"""Small checkpoints in memory whose layers have bits and group sizes of their own, said in the words of each method."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.packing import Packing, PackingScheme, pack, to_bytes
from requant.tasks.checkpoint.writer import Computed
from tests.factories.checkpoints import FULL
from tests.factories.quantization_configs import Changes

HIDDEN, INNER = 128, 64
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
EXPERT_SHAPES = {f"mlp.experts.{n}.{part}": SHAPES[f"mlp.{part}"] for n in (0, 1) for part in ("up_proj", "down_proj")}
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
         "up_proj": "gate_up_proj"}  # fmt: skip
ARCHITECTURES = {"LlamaForCausalLM": "model.layers", "Qwen3_5ForConditionalGeneration": "model.language_model.layers"}
# What some layers have of their own, and which: a pattern of what follows `layers`.
CHANGES: list[Changes] = [{"bits": 8}, {"group_size": 64}, {"bits": 8, "group_size": 64}, {"group_size": -1}, FULL]
PLACES = [
    r"\.\d+\.self_attn\..*", r"\.1\..*", r"\.0\.mlp\.down_proj", r"\.\d+\.mlp\.(gate|up)_proj", r"\..*\.down_proj",
    r"\.\d+\.self_attn\.q_proj", r"\.0\.self_attn\.qkv_proj", r"\..*experts.*", r"\.1\.mlp\.gate_up_proj",
]  # fmt: skip


@dataclass(frozen=True)
class Mixed:
    """A checkpoint and its base. `schemes`: how each module is packed in truth; None if it is not."""

    quantized: Checkpoint
    base: Checkpoint
    schemes: dict[str, PackingScheme | None]


def tensors_of(module: str, weight: Any, scheme: PackingScheme | None) -> list[Tensor]:
    """The tensors of a module, packed or as BF16."""
    if scheme is None:
        data = to_bytes(weight, "BF16")
        return [Computed.of(f"{module}.weight", "BF16", weight.shape, functools.partial(tuple, (data,)))]
    parts = pack([weight], weight.shape, scheme)
    return [
        Computed.of(f"{module}.{part}", dtype, parts[part].shape, functools.partial(tuple, (parts[part].tobytes(),)))
        for part, dtype in (("qweight", "I32"), ("qzeros", "I32"), ("scales", "F16"))
    ]


def checkpoint_of(folder: Path, architecture: str, quantization: Any, tensors: list[Tensor]) -> Checkpoint:
    config = ModelConfig(architectures=[architecture])
    if quantization is not None:
        config["quantization_config"] = quantization
    return Checkpoint(folder, config, {t.name: t for t in tensors}, (), None)


def mixed(random: Random, folder: Path) -> Mixed:
    """Make a checkpoint. A later override of the config counts only where no earlier one does, as patterns do."""
    architecture, body = random.choice(list(ARCHITECTURES.items()))
    method = random.choice(["gptq", "gptq_v2", "auto-round", "auto-round", "auto_round:gptqmodel"])
    packing: Packing = "gptq_v2" if method in ("gptq_v2", "auto_round:gptqmodel") else "gptq"
    moe = random.random() < 0.4
    shapes = {k: v for k, v in SHAPES.items() if not moe or "mlp" not in k} | (EXPERT_SHAPES if moe else {})
    modules = {f"{body}.{layer}.{name}": shape for layer in (0, 1) for name, shape in shapes.items()}
    places = random.sample(PLACES, random.randint(1, 3))
    overrides = [(f".*layers{place}", random.choice(CHANGES)) for place in places]
    own = {module: _first(overrides, module) for module in modules}
    schemes = {module: _scheme({"bits": 4, "group_size": 32, **change}, packing) for module, change in own.items()}
    config = _config(random, method, overrides, own)
    values = np.random.default_rng(random.randrange(1 << 32))
    weights = {module: values.normal(0, 0.05, shape).astype(np.float32) for module, shape in modules.items()}
    made = [tensor for module, weight in weights.items() for tensor in tensors_of(module, weight, schemes[module])]
    plain = [tensor for module, weight in weights.items() for tensor in tensors_of(module, weight, None)]
    return Mixed(
        checkpoint_of(folder, architecture, config, made), checkpoint_of(folder, architecture, None, plain), schemes
    )


def _first(overrides: list[tuple[str, Changes]], module: str) -> Changes:
    stem, _, leaf = module.rpartition(".")
    names = [module, f"{stem}.{FUSED.get(leaf, leaf)}"]
    return next((change for rule, change in overrides if any(re.fullmatch(rule, name) for name in names)), {})


def _scheme(values: Changes, packing: Packing) -> PackingScheme | None:
    return None if values["bits"] == 16 else PackingScheme(values["bits"], values["group_size"], packing)


def _config(random: Random, method: str, overrides: list[tuple[str, Changes]], own: dict[str, Changes]) -> Changes:
    """A config with the overrides as patterns or, for auto-round, with the names of all modules."""
    general = {"bits": 4, "group_size": 32, "sym": True}
    if method.startswith("gptq"):
        dynamic = {
            f"-:{rule}" if change == FULL else f"{random.choice(['+:', ''])}{rule}": {} if change == FULL else change
            for rule, change in overrides
        }
        version = {"checkpoint_format": method} if method == "gptq_v2" else {}
        return {"quant_method": "gptq", "desc_act": False, **general, "dynamic": dynamic, **version}
    extra = dict(overrides)
    if random.random() < 0.5:
        extra = {module: change for module, change in own.items() if change}
    version = {"packing_format": method if ":" in method else "auto_round:auto_gptq"}
    return {"quant_method": "auto-round", **general, "extra_config": extra, **version}
