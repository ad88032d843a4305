"""Models whose sizes and kinds of layers are others than those that the descriptions were made from are complete."""

from __future__ import annotations

from typing import Any

import pytest

from requant.tasks.checkpoint.completeness import Completeness
from requant.tasks.checkpoint.completeness.needs import FOLDER, Needs
from tests.factories.architectures import headers_only, pico_config, pico_shapes, stated

ALL = sorted(path.stem for path in FOLDER.iterdir())
QUICK = ["Qwen3MoeForCausalLM", "Glm4MoeForCausalLM", "Olmo3ForCausalLM", "Lfm2ForCausalLM"]
WIDE_HEAD = 40  # not the hidden size by the number of heads
SIZES: list[dict[str, int]] = [
    {"head_dim": WIDE_HEAD},
    {"head_dim": WIDE_HEAD, "num_key_value_heads": 1, "hidden_size": 80, "intermediate_size": 56, "vocab_size": 144},
]
GRANITE: dict[str, Any] = {
    "num_hidden_layers": 6, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "vocab_size": 160, "shared_intermediate_size": 48, "intermediate_size": 24, "num_key_value_heads": 2,
    "num_local_experts": 4, "layer_types": ["mamba"] * 3 + ["attention"] + ["mamba"] * 2,
}  # fmt: skip
FALCON: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 160,
    "new_decoder_architecture": True, "num_kv_heads": 2,
}  # fmt: skip
# By example of published models, with smaller sizes in the same proportions.
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("GraniteMoeHybridForCausalLM", {**GRANITE, "hidden_size": 48, "num_attention_heads": 6, "mamba_n_heads": 12}),
    ("GraniteMoeHybridForCausalLM", {**GRANITE, "hidden_size": 64, "num_attention_heads": 4, "mamba_n_heads": 16}),
    ("GraniteMoeHybridForCausalLM", {
        **GRANITE, "hidden_size": 64, "num_attention_heads": 4, "mamba_n_heads": 16, "num_local_experts": 0,
        "layer_types": ["attention"] * 6,
    }),
    ("FalconH1ForCausalLM", {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3,
        "mamba_d_ssm": 96, "mamba_d_head": 4, "mamba_n_heads": 24, "mamba_d_state": 16, "intermediate_size": 80,
        "vocab_size": 160, "projectors_bias": False, "mamba_rms_norm": False,
    }),
    ("Mamba2ForCausalLM", {
        "hidden_size": 40, "num_heads": 10, "head_dim": 8, "expand": 2, "n_groups": 2, "state_size": 16,
        "num_hidden_layers": 3, "vocab_size": 160,
    }),
    ("BambaForCausalLM", {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
        "num_hidden_layers": 4, "attn_layer_indices": [1], "mamba_n_heads": 16, "mamba_d_head": 8, "mamba_d_state": 8,
        "vocab_size": 160,
    }),
    ("Lfm2ForCausalLM", {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
        "num_hidden_layers": 6, "full_attn_idxs": [2, 5], "vocab_size": 160,
    }),
    ("FalconForCausalLM", {**FALCON, "num_ln_in_parallel_attn": 1}),
    ("FalconForCausalLM", FALCON),
    ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": False}),
]  # fmt: skip


def kinds_of_layers(name: str) -> list[str]:
    """Return the kinds of layers that the description tells apart or, where it tells none apart, usual ones."""
    needs = Needs.model_validate_json((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    conditions = [c for group in needs.groups for c in group.when or () if "layer_types[i] == " in c]
    return sorted({c.rpartition(" ")[2] for c in conditions}) or ["conv", "full_attention", "linear_attention"]


def resized(name: str, sizes: dict[str, int], kind: str | None) -> Any:
    """Make a config with other sizes or, with `kind`, every third layer of it. Raises whatever transformers raises."""
    config = pico_config(name, **sizes)
    text = config.get_text_config()
    if "head_dim" in sizes:
        text.head_dim = sizes["head_dim"]  # modules read it from configs that do not declare it too
    if kind is not None:
        text.layer_types = [kind if i % 3 == 2 else usual for i, usual in enumerate(text.layer_types)]
    return config


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in ALL if n not in QUICK)])
def test_models_of_other_sizes_and_kinds_of_layers_lack_nothing(name: str) -> None:
    variants: list[tuple[dict[str, int], str | None]] = [(sizes, None) for sizes in SIZES]
    built = 0
    for sizes, kind in variants + [({}, kind) for kind in kinds_of_layers(name)]:
        try:
            config = resized(name, sizes, kind)
            shapes = pico_shapes(config)
        except Exception:
            continue  # transformers does not build it with these sizes
        built += 1
        found = Completeness.of(headers_only(stated(config), shapes))
        assert found.architecture == name and found.lacks == []
    if not built:
        pytest.skip("transformers builds it with none of these sizes")


@pytest.mark.parametrize(("name", "sizes"), PUBLISHED)
def test_models_in_the_proportions_of_published_ones_lack_nothing(name: str, sizes: dict[str, Any]) -> None:
    import transformers

    config = getattr(transformers, name).config_class(**sizes)
    config.architectures = [name]
    found = Completeness.of(headers_only(stated(config), pico_shapes(config)))
    assert found.architecture == name and found.lacks == []
