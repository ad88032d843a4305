"""A pico base with an MTP head for each family of the table of layouts: names as its loaders read them, small shapes.

Not models that run. Nothing here is taken from the table: the names are from the draft models of vLLM 0.32.0 and
SGLang 0.5.23, so that a test compares the table with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.factories.checkpoints import to_bf16, write_checkpoint

HIDDEN, INTERMEDIATE, VOCAB, LAYERS = 64, 96, 128, 2
Shapes = dict[str, tuple[int, ...]]
_NORM, _MATRIX, _FUSION, _TABLE = (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN, 2 * HIDDEN), (VOCAB, HIDDEN)


@dataclass(frozen=True)
class Family:
    """A family: what its config says, where its model lies, and its head.

    `head` has shapes by name. `depths` are the drafts in a row that the head is for. `needed` is one of its tensors
    without which it is not complete; None if the family's layout says of no tensor that it must be there.
    """

    layout: str
    architecture: str
    model_type: str
    head: Shapes
    config: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    root: str = "model."
    depths: int = 1
    needed: str | None = None

    def config_json(self) -> dict[str, Any]:
        sizes = {
            "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS, "intermediate_size": INTERMEDIATE,
            "dtype": "bfloat16", "tie_word_embeddings": False,
        }  # fmt: skip
        config = {"architectures": [self.architecture], "model_type": self.model_type, **self.config}
        return config | ({"text_config": {**sizes, **self.text}} if self.text else sizes)

    def write(self, folder: Path) -> Path:
        shapes: Shapes = {f"{self.root}embed_tokens.weight": _TABLE, f"{self.root}norm.weight": _NORM}
        shapes |= {"lm_head.weight": _TABLE}
        for number in range(LAYERS):
            shapes |= _decoder(f"{self.root}layers.{number}")
        random = np.random.default_rng(0)
        tensors = {
            name: ("BF16", shape, to_bf16(random.normal(0, 0.05, shape)))
            for name, shape in (shapes | self.head).items()
        }
        write_checkpoint(folder, {"model-00001-of-00001.safetensors": tensors}, self.config_json())
        (folder / "tokenizer.json").write_text("{}")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
        return folder


def _decoder(prefix: str) -> Shapes:
    shapes: Shapes = {f"{prefix}.self_attn.{n}_proj.weight": _MATRIX for n in "qkvo"}
    shapes |= {f"{prefix}.mlp.{n}_proj.weight": (INTERMEDIATE, HIDDEN) for n in ("gate", "up")}
    shapes |= {f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
    return shapes | _norms(prefix, "input_layernorm", "post_attention_layernorm")


def _norms(prefix: str, *names: str) -> Shapes:
    return {f"{prefix}.{name}.weight": _NORM for name in names}


def _qwen(layers: int = 1) -> Shapes:
    shapes: Shapes = {"mtp.fc.weight": _FUSION} | _norms("mtp", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    for number in range(layers):
        shapes |= _decoder(f"mtp.layers.{number}")
    return shapes


def _behind(root: str = "model.", norm: str = "shared_head.norm", layers: int = 1, copies: bool = False) -> Shapes:
    shapes: Shapes = {}
    for prefix in (f"{root}layers.{LAYERS + number}" for number in range(layers)):
        shapes |= _decoder(prefix) | _norms(prefix, "enorm", "hnorm", norm) | {f"{prefix}.eh_proj.weight": _FUSION}
        if copies:
            shapes |= {f"{prefix}.embed_tokens.weight": _TABLE, f"{prefix}.shared_head.head.weight": _TABLE}
    return shapes


def _step() -> Shapes:
    shapes = _behind(norm="transformer.shared_head.norm", layers=3)
    outputs = (f"model.layers.{LAYERS + number}.transformer.shared_head.output.weight" for number in range(3))
    return shapes | dict.fromkeys(outputs, _TABLE)


def _mimo_v2() -> Shapes:
    shapes: Shapes = {}
    for prefix in (f"model.mtp.layers.{number}" for number in range(3)):
        block = {n: s for n, s in _decoder(prefix).items() if "post_attention" not in n}
        shapes |= block | {f"{prefix}.eh_proj.weight": _FUSION}
        shapes |= _norms(prefix, "enorm", "hnorm", "pre_mlp_layernorm", "final_layernorm")
    return shapes


def _ernie() -> Shapes:
    norms = _norms("model.mtp_emb_norm", "0") | _norms("model.mtp_hidden_norm", "0")
    return _decoder("model.mtp_block.0") | norms | {"model.mtp_linear_proj.0.weight": _FUSION}


def _nemotron(root: str = "") -> Shapes:
    first, second = f"{root}mtp.layers.0", f"{root}mtp.layers.1"
    shapes: Shapes = {f"{first}.mixer.{n}_proj.weight": _MATRIX for n in "qkvo"}
    shapes |= _norms(first, "norm", "enorm", "hnorm") | {f"{first}.eh_proj.weight": _FUSION}
    shapes |= {f"{second}.mixer.gate.weight": (2, HIDDEN)}
    for expert in ("experts.0", "experts.1", "shared_experts"):
        shapes[f"{second}.mixer.{expert}.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{second}.mixer.{expert}.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes | _norms(second, "norm", "final_layernorm")


def _longcat() -> Shapes:
    prefix = "model.mtp.layers.0"
    block = {n.replace(".mlp.", ".transformer_layer.mlp."): s for n, s in _decoder(prefix).items()}
    shapes = block | _norms(prefix, "enorm.m", "hnorm.m") | _norms("model.mtp", "norm")
    return shapes | {f"{prefix}.eh_proj.weight": _FUSION, "model.mtp.embed_tokens.weight": _TABLE}


def _deepseek_v4() -> Shapes:
    names = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "ffn.gate", "e_proj", "h_proj")
    shapes: Shapes = {f"mtp.0.{name}.weight": _MATRIX for name in names}
    shapes |= {f"mtp.0.ffn.experts.{e}.w{w}.weight": _MATRIX for e in range(2) for w in (1, 2, 3)}
    shapes |= {"mtp.0.attn.attn_sink": (4,), "mtp.0.hc_head_fn": (4, HIDDEN), "mtp.0.hc_attn_scale": (3,)}
    shapes |= {"mtp.0.emb.tok_emb.weight": _TABLE, "mtp.0.head.weight": _TABLE}
    return shapes | _norms("mtp.0", "attn_norm", "ffn_norm", "enorm", "hnorm", "norm")


def _dspark() -> Shapes:
    """Three stages, each a decoder block: the first takes the model's hidden states, the last gives the tokens."""
    shapes: Shapes = {"mtp.0.main_proj.weight": _FUSION, "mtp.2.hc_head_fn": (4, HIDDEN)}
    shapes |= {f"mtp.2.markov_head.markov_{w}.weight": _TABLE for w in ("w1", "w2")}
    shapes |= {"mtp.2.confidence_head.proj.weight": (1, HIDDEN)}
    shapes |= _norms("mtp.0", "main_norm") | _norms("mtp.2", "norm")
    names = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "ffn.gate")
    for stage in (f"mtp.{number}" for number in range(3)):
        shapes |= {f"{stage}.{name}.weight": _MATRIX for name in names} | _norms(stage, "attn_norm", "ffn_norm")
        shapes |= {f"{stage}.ffn.experts.{e}.w{w}.weight": _MATRIX for e in range(2) for w in (1, 2, 3)}
    return shapes


def _minimax() -> Shapes:
    shapes: Shapes = {}
    for prefix in (f"language_model.model.mtp.layers.{number}" for number in range(2)):
        shapes |= _decoder(f"{prefix}.transformer_layer") | _norms(prefix, "enorm", "hnorm", "final_layernorm")
        shapes |= {f"{prefix}.eh_proj.weight": _FUSION}
    return shapes


def _inkling() -> Shapes:
    shapes: Shapes = _norms("model.mtp", "chain_norm")
    for prefix in (f"model.mtp.layers.{number}" for number in range(2)):
        shapes |= _norms(prefix, "embed_norm", "hidden_norm") | {f"{prefix}.input_proj.weight": _FUSION}
        shapes |= {f"{prefix}.transformer_block.attn.{n}.weight": _MATRIX for n in ("wq_du", "wk_dv", "wv_dv")}
        shapes |= {f"{prefix}.transformer_block.mlp.w2_md.weight": _MATRIX}
    return shapes


def _qwen4() -> Shapes:
    shapes = _decoder("mtp.layers.0") | _norms("mtp", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return shapes | {"mtp.fc_embedding.weight": _MATRIX, "mtp.fc_hidden.weight": _MATRIX}


def _iquest() -> Shapes:
    shapes = {f"mtp.mtp_model_layer.attn.{n}_proj.weight": _MATRIX for n in "qkvo"}
    return shapes | _norms("mtp", "enorm", "hnorm", "final_layernorm") | {"mtp.eh_proj.weight": _FUSION}


def _mimo() -> Shapes:
    prefix = "model.mtp_layers.0"
    shapes = _decoder(prefix) | _norms(prefix, "token_layernorm", "hidden_layernorm", "final_layernorm")
    return shapes | {f"{prefix}.input_proj.weight": _FUSION}


def _hy_v4() -> Shapes:
    prefix = "model.mtp_layers.0"
    return (
        _decoder(prefix) | _norms(prefix, "enorm", "hnorm", "final_layernorm") | {f"{prefix}.eh_proj.weight": _FUSION}
    )


_ONE, _COUNTED = {"mtp_num_hidden_layers": 1}, {"num_nextn_predict_layers": 1}
_EH_PROJ = f"model.layers.{LAYERS}.eh_proj.weight"
FAMILIES: dict[str, Family] = {
    "qwen3-next": Family("mtp", "Qwen3NextForCausalLM", "qwen3_next", _qwen(), _COUNTED, needed="mtp.fc.weight"),
    "qwen3.5": Family(
        "mtp", "Qwen3_5ForCausalLM", "qwen3_5_text", _qwen(), _ONE, needed="mtp.layers.0.mlp.up_proj.weight"
    ),
    "qwen3.6-uncounted": Family("mtp", "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", _qwen()),
    "exaone-moe": Family("mtp", "ExaoneMoEForCausalLM", "exaone_moe", _qwen(), _COUNTED, needed="mtp.norm.weight"),
    "deepseek-v3": Family(
        "inlined", "DeepseekV3ForCausalLM", "deepseek_v3", _behind(copies=True), _COUNTED, needed=_EH_PROJ
    ),
    "deepseek-v3.2": Family("inlined", "DeepseekV32ForCausalLM", "deepseek_v32", _behind(), _COUNTED, needed=_EH_PROJ),
    "glm-4.5": Family("inlined", "Glm4MoeForCausalLM", "glm4_moe", _behind(), _COUNTED, needed=_EH_PROJ),
    "glm-5": Family("inlined", "GlmMoeDsaForCausalLM", "glm_moe_dsa", _behind(), _COUNTED, needed=_EH_PROJ),
    "glm-ocr": Family(
        "inlined", "GlmOcrForConditionalGeneration", "glm_ocr", _behind("model.language_model."),
        _COUNTED, text=_COUNTED, root="model.language_model.", needed="model.language_model.layers.2.enorm.weight",
    ),
    "kimi-k3": Family(
        "inlined", "KimiK3ForConditionalGeneration", "kimi_k3", _behind("language_model.model."),
        text=_COUNTED, root="language_model.model.", needed="language_model.model.layers.2.hnorm.weight",
    ),
    "dots3": Family(
        "dots3", "Dots3NoteForCausalLM", "dots3_note", {**_behind(), "model.mtp.embed_tokens.weight": _TABLE}, _COUNTED,
        needed=_EH_PROJ,
    ),
    "step-3.5": Family(
        "step3p5", "Step3p5ForCausalLM", "step3p5", _step(), {"num_nextn_predict_layers": 3}, depths=3,
        needed="model.layers.3.enorm.weight",
    ),
    "hunyuan-v3": Family(
        "final-norm", "HYV3ForCausalLM", "hy_v3", _behind(norm="final_layernorm"), _COUNTED,
        needed="model.layers.2.final_layernorm.weight",
    ),
    "bailing-2.5": Family(
        "final-norm", "BailingMoeV2_5ForCausalLM", "bailing_hybrid", _behind(norm="final_layernorm"), _COUNTED,
        needed=_EH_PROJ,
    ),
    "hunyuan-v4": Family(
        "hy_v4", "HYV4ForCausalLM", "hy_v4", _hy_v4(), {"num_nextn_predict_layers": 2},
        needed="model.mtp_layers.0.enorm.weight",
    ),
    "mimo": Family(
        "mimo", "MiMoForCausalLM", "mimo", _mimo(), _COUNTED, needed="model.mtp_layers.0.input_proj.weight"
    ),
    "mimo-v2": Family(
        "mimo_v2", "MiMoV2FlashForCausalLM", "mimo_v2_flash", _mimo_v2(), depths=3,
        needed="model.mtp.layers.0.pre_mlp_layernorm.weight",
    ),
    "ernie-4.5": Family(
        "ernie4_5", "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", _ernie(), _COUNTED,
        needed="model.mtp_linear_proj.0.weight",
    ),
    "nemotron-h": Family(
        "nemotron_h", "NemotronHForCausalLM", "nemotron_h", _nemotron(),
        {**_COUNTED, "mtp_hybrid_override_pattern": "*E"}, root="backbone.",
        needed="mtp.layers.1.final_layernorm.weight",
    ),
    "nemotron-omni": Family(
        "nemotron_h", "NemotronH_Omni_Reasoning_V3", "nemotron_omni", _nemotron("language_model."),
        text={**_COUNTED, "model_type": "nemotron_h", "mtp_hybrid_override_pattern": "*E"},
        root="language_model.backbone.", needed="language_model.mtp.layers.0.eh_proj.weight",
    ),
    "longcat": Family(
        "longcat", "LongcatFlashForCausalLM", "longcat_flash", _longcat(), _COUNTED, needed="model.mtp.norm.weight"
    ),
    "deepseek-v4": Family(
        "deepseek_v4", "DeepseekV4ForCausalLM", "deepseek_v4", _deepseek_v4(), _COUNTED, root="",
        needed="mtp.0.e_proj.weight",
    ),
    "deepseek-v4.1": Family(
        "dspark", "DeepseekV41ForCausalLM", "deepseek_v41", _dspark(), {"n_mtp_layers": 3}, root="",
        needed="mtp.0.main_proj.weight",
    ),
    "deepseek-v4-dspark": Family(
        "dspark", "DeepseekV4ForCausalLM", "deepseek_v4", _dspark(), {**_COUNTED, "dspark_block_size": 5}, root="",
        needed="mtp.0.main_norm.weight",
    ),
    "minimax-m3": Family(
        "minimax_m3", "MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl", _minimax(),
        text={"num_mtp_modules": 2}, root="language_model.model.", depths=2,
        needed="language_model.model.mtp.layers.1.eh_proj.weight",
    ),
    "inkling": Family(
        "inkling", "InklingForConditionalGeneration", "inkling_mm_model", _inkling(),
        {"mtp_config": {"num_nextn_predict_layers": 2}}, text={"model_type": "inkling_model"}, root="model.llm.",
        depths=2, needed="model.mtp.layers.1.input_proj.weight",
    ),
    "qwen4-exp": Family(
        "qwen4_exp", "Qwen4ExpForConditionalGeneration", "qwen4_exp", _qwen4(), text=_ONE,
        root="model.language_model.", needed="mtp.fc_hidden.weight",
    ),
    "iquest-flat": Family("iquest_q1", "IQuestQ1ForCausalLM", "iquest_q1", _iquest(), {"num_mtp_layers": 1}),
    "unheard-of": Family(
        "unknown", "UnheardOfForCausalLM", "unheard_of", {f"model.nextn.{n}": s for n, s in _decoder("x").items()},
        _COUNTED,
    ),
    "unheard-of-behind": Family(
        "unknown", "UnheardOfForCausalLM", "unheard_of", {**_decoder("model.layers.2"), "model.layers.2.mix": _MATRIX}
    ),
}  # fmt: skip
