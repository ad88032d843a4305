"""Recognizes draft models in repos of their own. Engines load them beside their base; they are no base models.

Sources: vLLM 0.32.0, model_executor/models/registry.py (_SPECULATIVE_DECODING_MODELS), config/speculative.py and
transformers_utils/configs/speculators; SGLang 0.5.23, `EntryClass` of srt/models/{*eagle*,dflash,*dspark*,*nextn,*mtp,
ernie4_eagle,inkling}.py.
"""

from __future__ import annotations

from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.heads.layout import architecture_of

# Values of `architectures` by the kind of the draft model.
ARCHITECTURES: dict[str, frozenset[str]] = {
    "EAGLE-3": frozenset({
        "Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3", "Eagle3MiniMaxM2ForCausalLM", "Eagle3Qwen2_5vlForCausalLM",
        "Eagle3Qwen3vlForCausalLM", "Eagle3Qwen3ForCausalLM", "Eagle3DeepseekV2ForCausalLM",
        "Eagle3DeepseekV3ForCausalLM", "PEagleDraftModel", "PeagleLlamaForCausalLM", "PeagleQwen3ForCausalLM",
        "Eagle3Speculator", "Eagle3DraftModel",
    }),
    "EAGLE": frozenset({
        "EagleLlamaForCausalLM", "LlamaForCausalLMEagle", "EagleLlama4ForCausalLM", "EagleMiniCPMForCausalLM",
        "EagleCohereForCausalLM", "EagleMistralForCausalLM", "MistralForCausalLMEagle", "EagleMistralLarge3ForCausalLM",
        "MistralLarge3ForCausalLMEagle", "Qwen2ForCausalLMEagle", "EagleDeepSeekMTPModel", "EagleSpeculator",
    }),
    "DFlash": frozenset({
        "DFlashDraftModel", "DFlash2DraftModel", "DFlash2BeamDraftModel", "DFlashLagunaForCausalLM",
        "MiniMaxDFlash2DraftModel", "MuseGlimmerAssistantModel", "DFlashMuseGlimmerAssistantModel",
        "LiLiCorrDraftModel",
    }),
    "DSpark": frozenset({
        "DSparkDraftModel", "DSparkV41DraftModel", "Qwen3DSparkModel", "Qwen3OmniDSparkModel", "K3DSparkModel",
        "Gemma4DSparkModel", "LingDSparkModel", "DSparkMiniMaxDraftModel", "Lfm2DSparkDraftModel",
        "DeepseekV4ForCausalLMDSpark",
    }),
    "Gemma assistant": frozenset({"Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM", "Gemma4MTPModel"}),
    "Medusa": frozenset({"MedusaModel"}),
    "MTP": frozenset({
        # vLLM
        "BailingMoeV25MTPModel", "BailingMoeV3MTPModel", "DeepSeekMTPModel", "DeepSeekV4MTPModel",
        "DeepseekV32MTPModel", "Dots3NoteMTPModel", "ErnieMTPModel", "Exaone4_5_MTP", "ExaoneMoeMTP",
        "Glm4MoeLiteMTPModel", "Glm4MoeMTPModel", "Glm5NextMTPModel", "GlmOcrMTPModel", "HYV3MTPModel", "HYV4MTPModel",
        "InklingMTPModel", "InternS2MobiusMTP", "KimiK3MTPModel", "LongCatFlashMTPModel", "MiMoMTPModel",
        "MiMoV2MTPModel", "MiMoV2OmniMTPModel", "MiniMaxM3MTP", "NemotronHMTPModel", "OpenPanguMTPModel",
        "Qwen3NextMTP", "Qwen3_5MTP", "Qwen3_5MoeMTP", "Qwen4ExpMTP", "Step3p5MTP",
        # SGLang
        "BailingMoeForCausalLMNextN", "DeepseekV3ForCausalLMNextN", "DeepseekV4ForCausalLMNextN",
        "Dots3NoteForCausalLMNextN", "Ernie4_5_MoeForCausalLMMTP", "ExaoneMoEForCausalLMMTP",
        "GigaChat35ForCausalLMNextN", "Glm4MoeForCausalLMNextN", "Glm4MoeLiteForCausalLMNextN",
        "Glm5NextForConditionalGenerationNextN", "GlmOcrForConditionalGenerationNextN", "HYV3ForCausalLMNextN",
        "HYV4ForCausalLMNextN", "IQuestQ1MTP", "InklingForConditionalGenerationMTP", "LongcatFlashForCausalLMNextN",
        "MiMoMTP", "MiMoV2MTP", "NemotronHForCausalLMMTP", "Qwen3MoeForCausalLMMTP", "Qwen3NextForCausalLMMTP",
        "Qwen3_5ForCausalLMMTP", "Qwen4ExpForCausalLMMTP",
    }),
}  # fmt: skip
# Values of `speculators_model_type`, in the configs of the library speculators, and of `model_type`.
MODEL_TYPES = {
    "eagle3": "EAGLE-3", "peagle": "EAGLE-3", "eagle": "EAGLE", "dflash": "DFlash", "dspark": "DSpark",
    "medusa": "Medusa", "gemma4_assistant": "Gemma assistant", "gemma4_unified_assistant": "Gemma assistant",
    "iquest_q1_mtp": "MTP", "minimax_m3_mtp": "MTP",
}  # fmt: skip


def drafter_kind(config: ModelConfig) -> str | None:
    """Return what kind of draft model a repo with this config is, as `EAGLE-3`; None if it is none."""
    name = architecture_of(config)
    by_name = next((kind for kind, names in ARCHITECTURES.items() if name in names), None)
    stated = (config.string(key) or "" for key in ("speculators_model_type", "model_type"))
    return by_name or next((MODEL_TYPES[kind] for kind in stated if kind in MODEL_TYPES), None)


def is_no_base(kind: str) -> str:
    """Return a part of a sentence that says what a draft model of this kind is."""
    return f"a draft model ({kind}), which engines load beside its base, and no base model"
