"""The layouts of MTP heads, one for each way in which families store them.

Sources: vLLM 0.32.0, config/speculative.py (hf_config_override) and the loader that each entry names, below
vllm/model_executor/models or vllm/models; SGLang 0.5.23, srt/configs/model_config.py (_config_draft_model) and the
loader below srt/models. tests/engines/test_head_layouts.py compares the names with vLLM's loaders.

A layout that is not here is `unknown`: its tensors stay as they are, and nothing is said about it.
"""

from __future__ import annotations

from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.heads.layout import Drafter, HeadLayout, architecture_of

UNKNOWN = "unknown"
_NEXTN = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
_DECODER = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")


def _all(*names: str) -> frozenset[str]:
    return frozenset(names)


def _below(stem: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{name}" for name in names)


MTP = HeadLayout(
    "mtp",
    ("Qwen3-Next", "Qwen3.5", "Qwen3.6", "Intern-S2", "EXAONE MoE", "EXAONE 4.5"),
    layers="mtp.layers.*",
    modules=("mtp.fc", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"),
    others=("mtp.layers.*",),
    counts=("mtp_num_hidden_layers", "num_nextn_predict_layers"),
    default=1,
    exact=True,
    layers_differ=_all("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM", "Exaone4_5_ForConditionalGeneration"),
    engines={
        "vllm": Drafter(
            "qwen3_next_mtp.py, qwen3_5_mtp.py, exaone_moe_mtp.py, exaone4_5_mtp.py",
            _all(
                "Qwen3NextForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
                "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Exaone4_5_ForConditionalGeneration",
            ),
            _all(
                "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "intern_s2_preview",
                "interns2_mobius", "exaone_moe", "exaone4_5", "exaone4_5_text",
            ),
        ),
        "sglang": Drafter(
            "qwen3_next_mtp.py, qwen3_5_mtp.py, qwen3_moe_mtp.py, exaone_moe_mtp.py",
            _all(
                "Qwen3NextForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
                "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "InternS2PreviewForConditionalGeneration",
                "InternS2MobiusForConditionalGeneration", "ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM",
                "Qwen3MoeForCausalLM",
            ),
        ),
    },
)  # fmt: skip
INLINED = HeadLayout(
    "inlined",
    ("DeepSeek V3", "DeepSeek V3.2", "GLM-4.5", "GLM-4.6", "GLM-4.7", "GLM-5", "GLM-OCR", "Kimi K3", "openPangu Ultra",
     "GigaChat 3.5"),
    layers="layers.*",
    modules=_below("layers.*", "eh_proj", "enorm", "hnorm", "shared_head.norm"),
    others=_below("layers.*", *_DECODER),
    shared=_below("layers.*", "embed_tokens", "shared_head.head"),
    counts=_NEXTN,
    exact=True,
    layers_differ=_all(
        "PanguUltraMoEForCausalLM", "KimiK3ForConditionalGeneration", "GlmOcrForConditionalGeneration",
        "Glm5NextForConditionalGeneration", "Glm5NextForCausalLM", "GigaChat35ForCausalLM",
    ),
    engines={
        "vllm": Drafter(
            "deepseek_mtp.py, glm4_moe_mtp.py, glm4_moe_lite_mtp.py, glm_ocr_mtp.py, openpangu_mtp.py, "
            "deepseek_v32/nvidia/mtp.py, glm5next/common/mtp.py, kimi_k3/nvidia/mtp.py",
            _all(
                "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "GlmOcrForConditionalGeneration",
                "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM",
            ),
            _all("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "pangu_ultra_moe", "glm5_next", "kimi_k3"),
        ),
        "sglang": Drafter(
            "deepseek_nextn.py, glm4_moe_nextn.py, glm4_moe_lite_nextn.py, glm_ocr_nextn.py, glm5_next_nextn.py, "
            "gigachat35_mtp.py",
            _all(
                "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "Glm4MoeForCausalLM",
                "Glm4MoeLiteForCausalLM", "Glm5NextForConditionalGeneration", "GlmOcrForConditionalGeneration",
                "GigaChat35ForCausalLM",
            ),
        ),
    },
)  # fmt: skip
_STEP_NORM = "layers.*.transformer.shared_head.norm|layers.*.shared_head.norm"
_STEP_OUTPUTS = ("transformer.shared_head.output", "shared_head.output", "shared_head.head", "embed_tokens")
_STEP = _all("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration")
_MIMO_V2 = ("enorm", "hnorm", "eh_proj", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")

LAYOUTS: tuple[HeadLayout, ...] = (
    MTP,
    INLINED,
    HeadLayout(
        "step3p5",
        ("Step-3.5", "Step-3.7"),
        layers="layers.*",
        modules=(*_below("layers.*", "eh_proj", "enorm", "hnorm"), _STEP_NORM),
        others=_below("layers.*", *_DECODER, "moe", "share_expert", "transformer"),
        shared=_below("layers.*", *_STEP_OUTPUTS),
        default=1,
        engines={
            "vllm": Drafter("step3p5_mtp.py", _STEP, _all("step3p5", "step3p7")),
            "sglang": Drafter("step3p5_mtp.py", _STEP),
        },
    ),
    HeadLayout(
        "final-norm",
        ("Hunyuan V3", "Ling and Ring 2.5", "Ling 3"),
        layers="layers.*",
        modules=_below("layers.*", "eh_proj", "enorm", "hnorm", "final_layernorm"),
        others=_below("layers.*", *_DECODER, "attention"),
        shared=_below("layers.*", "embed_tokens", "shared_head", "word_embeddings"),
        engines={
            "vllm": Drafter(
                "hy_v3_mtp.py, bailing_moe_mtp.py, bailing_moe_v3_mtp.py",
                _all(
                    "BailingMoeV2_5ForCausalLM", "BailingMoeV3ForCausalLM", "BailingMoeV3VLForConditionalGeneration"
                ),
                _all("hy_v3", "bailing_hybrid"),
            ),
            "sglang": Drafter(
                "hunyuan_v3_nextn.py, bailing_moe_nextn.py",
                _all(
                    "HYV3ForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM", "BailingMoeV2_5ForCausalLM",
                    "BailingMoeV3ForCausalLM",
                ),
            ),
        },
    ),
    HeadLayout(
        "dots3",
        ("dots3",),
        layers="layers.*",
        modules=_below("layers.*", "eh_proj", "enorm", "hnorm", "shared_head.norm"),
        others=_below("layers.*", *_DECODER),
        shared=("mtp.embed_tokens", *_below("layers.*", "embed_tokens", "shared_head.head")),
        default=1,
        engines={
            "vllm": Drafter("dots3_note/nvidia/mtp.py", model_types=_all("dots3_note")),
            "sglang": Drafter("dots3_nextn.py", _all("Dots3NoteForCausalLM")),
        },
    ),
    HeadLayout(
        "mimo",
        ("MiMo-7B",),
        layers="mtp_layers.*",
        modules=_below("mtp_layers.*", "input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm"),
        others=_below("mtp_layers.*", *_DECODER),
        engines={
            "vllm": Drafter("mimo_mtp.py", _all("MiMoForCausalLM")),
            "sglang": Drafter("mimo_mtp.py", _all("MiMoForCausalLM")),
        },
    ),
    HeadLayout(
        "hy_v4",
        ("Hunyuan V4",),
        layers="mtp_layers.*",
        modules=_below("mtp_layers.*", "eh_proj", "enorm", "hnorm", "final_layernorm"),
        others=_below("mtp_layers.*", *_DECODER),
        shared=_below("mtp_layers.*", "embed_tokens", "shared_head"),
        counts=(),  # 1 and 2 both stand for one layer
        default=1,
        engines={
            "vllm": Drafter("hy_v4/nvidia/mtp.py", model_types=_all("hy_v4")),
            "sglang": Drafter("hunyuan_v4_nextn.py", _all("HYV4ForCausalLM")),
        },
    ),
    HeadLayout(
        "mimo_v2",
        ("MiMo-V2-Flash", "MiMo-V2.5"),
        layers="mtp.layers.*",
        modules=_below("mtp.layers.*", *_MIMO_V2),
        others=_below("mtp.layers.*", "self_attn", "mlp"),
        counts=(),  # both engines build one layer, whatever the config says
        default=1,
        engines={
            "vllm": Drafter(
                "mimo_v2_mtp.py", _all("MiMoV2ForCausalLM", "MiMoV2OmniForCausalLM", "MiMoV2FlashForCausalLM")
            ),
            "sglang": Drafter("mimo_v2_nextn.py", _all("MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM")),
        },
    ),
    HeadLayout(
        "ernie4_5",
        ("ERNIE 4.5",),
        layers="mtp_block.*",
        modules=("mtp_emb_norm.*", "mtp_hidden_norm.*", "mtp_linear_proj.*", *_below("mtp_block.*", *_DECODER)),
        engines={
            "vllm": Drafter("ernie_mtp.py", model_types=_all("ernie4_5_moe")),
            "sglang": Drafter("ernie4_eagle.py", _all("Ernie4_5_MoeForCausalLM")),
        },
    ),
    HeadLayout(
        "nemotron_h",
        ("Nemotron-H", "Nemotron 3 Super", "Nemotron Omni"),
        layers="mtp.layers.*",
        modules=_below("mtp.layers.*", "enorm", "hnorm", "eh_proj", "norm", "mixer", "final_layernorm"),
        at_end=_all("mtp.layers.*.final_layernorm"),
        patterns=("mtp_hybrid_override_pattern", "mtp_layers_block_type"),
        engines={
            "vllm": Drafter(
                "nemotron_h_mtp.py",
                _all("NemotronH_Super_Omni_Reasoning_V3", "NemotronH_Omni_Reasoning_V3"),
                _all("nemotron_h", "nemotron_h_puzzle"),
                most_depths=1,
            ),
            "sglang": Drafter(
                "nemotron_h_mtp.py",
                _all("NemotronHForCausalLM", "NemotronHPuzzleForCausalLM", "NemotronH_Omni_Reasoning_V3"),
            ),
        },
    ),
    HeadLayout(
        "longcat",
        ("LongCat-Flash",),
        layers="mtp.layers.*",
        modules=("mtp.norm", *_below("mtp.layers.*", "eh_proj", "enorm.m", "hnorm.m", "transformer_layer.mlp")),
        others=_below("mtp.layers.*", *_DECODER),
        shared=("mtp.embed_tokens",),
        default=1,
        engines={
            "vllm": Drafter("longcat_flash_mtp.py", model_types=_all("longcat_flash")),
            "sglang": Drafter("longcat_flash_nextn.py", _all("LongcatFlashForCausalLM")),
        },
    ),
    HeadLayout(
        "deepseek_v4",
        ("DeepSeek V4",),
        layers="mtp.*",
        modules=_below("mtp.*", "e_proj", "h_proj", "enorm", "hnorm", "norm", "attn", "ffn"),
        others=_below("mtp.*", "attn_norm", "ffn_norm", "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn",
                      "hc_ffn_base", "hc_ffn_scale", "hc_head_fn", "hc_head_base", "hc_head_scale"),
        shared=_below("mtp.*", "emb.tok_emb", "head"),
        engines={
            "vllm": Drafter("deepseek_v4/nvidia/mtp.py", model_types=_all("deepseek_v4")),
            "sglang": Drafter("deepseek_v4_nextn.py", _all("DeepseekV4ForCausalLM")),
        },
    ),
    HeadLayout(
        "minimax_m3",
        ("MiniMax-M3",),
        layers="mtp.layers.*",
        modules=_below("mtp.layers.*", "enorm", "hnorm", "eh_proj", "final_layernorm", "transformer_layer"),
        counts=("num_mtp_modules", "num_nextn_predict_layers"),
        default=1,
        engines={
            "vllm": Drafter(
                "minimax_m3/nvidia/mtp.py",
                _all("MiniMaxM3SparseForConditionalGeneration"),
                _all("minimax_m3_vl"),
            ),
        },
    ),
    HeadLayout(
        "inkling",
        ("Inkling",),
        layers="mtp.layers.*",
        modules=_below("mtp.layers.*", "embed_norm", "hidden_norm", "input_proj", "transformer_block"),
        others=("mtp.chain_norm",),
        counts=("mtp_config.num_nextn_predict_layers",),
        engines={
            "vllm": Drafter("inkling/nvidia/mtp.py", model_types=_all("inkling_mm_model", "inkling_model")),
            "sglang": Drafter("inkling.py", _all("InklingForConditionalGeneration")),
        },
    ),
    HeadLayout(
        "qwen4_exp",
        ("Qwen4-exp",),
        layers="mtp.layers.*",
        modules=("mtp.fc_embedding", "mtp.fc_hidden", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"),
        others=("mtp.layers.*", "mtp.hyper_connection_mixer", "mtp.norm"),
        shared=("mtp.shared_head.head",),
        counts=("mtp_num_hidden_layers", "num_nextn_predict_layers"),
        default=1,
        engines={
            "vllm": Drafter("qwen4_exp/nvidia/mtp.py", model_types=_all("qwen4_exp", "qwen4_exp_text")),
            "sglang": Drafter("qwen4_exp_mtp.py", _all("Qwen4ExpForConditionalGeneration")),
        },
    ),
    HeadLayout(
        "iquest_q1",
        ("IQuest Q1",),
        layers="",
        modules=("mtp.eh_proj", "mtp.enorm", "mtp.hnorm", "mtp.final_layernorm", "mtp.mtp_model_layer"),
        counts=("num_mtp_layers", "num_nextn_predict_layers"),
        default=1,
        engines={"sglang": Drafter("iquest_q1_mtp.py", _all("IQuestQ1MTP"), _all("iquest_q1_mtp"))},
    ),
    HeadLayout(
        "dspark",
        ("DeepSeek V4.1", "DeepSeek V4 with DSpark stages"),
        layers="mtp.*",
        modules=_below("mtp.*", "main_proj", "main_norm", "norm"),
        at_end=_all("mtp.*.norm"),
        others=("mtp.*",),
        counts=("n_mtp_layers",),
        one_depth=True,
        method="dspark",
        engines={
            "vllm": Drafter(
                "deepseek_v4/nvidia/dspark.py, deepseek_v41/nvidia/dspark.py",
                _all("DeepseekV41ForCausalLM"),
                _all("deepseek_v4", "deepseek_v41"),
            ),
            "sglang": Drafter("deepseek_v4_dspark.py", _all("DeepseekV4ForCausalLM")),
        },
    ),
)  # fmt: skip
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def has_draft_model(engine: str, config: ModelConfig) -> bool:
    """Check whether an engine has a draft model for a model's MTP head, by the method `mtp`.

    For a config that names no architecture this is not known, and assumed.
    """
    drafters = (layout.engines[engine] for layout in LAYOUTS if layout.method == "mtp" and engine in layout.engines)
    return not architecture_of(config) or any(drafter.serves(config) for drafter in drafters)


def promised_layers(config: ModelConfig) -> int:
    """Return how many MTP layers a config promises; 0 if no engine drafts with a head of the model.

    Some families count the layers of a head that was trained and is in no checkpoint, as MiniMax-M2.
    """
    return config.mtp_layers if any(layout.belongs_to(config) for layout in LAYOUTS) else 0
