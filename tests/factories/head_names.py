"""Names and shapes of tensors of MTP heads in two layouts, and of the model that they belong to."""

from __future__ import annotations

from requant.tasks.checkpoint.config import ModelConfig

APART = {
    "mtp.fc.weight": (8, 16),
    "mtp.norm.weight": (8,),
    "mtp.pre_fc_norm_hidden.weight": (8,),
    "mtp.layers.0.self_attn.q_proj.weight": (8, 8),
    "mtp.layers.0.self_attn.q_norm.weight": (4,),
    "mtp.layers.0.mlp.experts.gate_up_proj": (4, 8, 8),
    "mtp.layers.0.mlp.gate.weight": (4, 8),
}
INLINED = {
    "model.layers.2.eh_proj.weight": (8, 16),
    "model.layers.2.enorm.weight": (8,),
    "model.layers.2.self_attn.o_proj.weight": (8, 8),
    "model.layers.2.mlp.gate.e_score_correction_bias": (4,),
}
MAIN = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
COUNTED = ModelConfig(num_hidden_layers=2, num_nextn_predict_layers=1)
